//! The thread of the main connection at the destination.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::frames::{self, FRAME_TIMEOUT};
use super::Shared;
use super::faults;
use super::greet::drain;
use super::guest::DestinationGuest;
use crate::memory::PageRun;
use crate::migrate::destination::{Action, Input, Outcome, Placement, Poll};
use crate::migrate::report::Status;
use crate::migrate::transport::{Awaited, Reader, Writer};
use crate::migrate::wire::{Channel, Frame, MAX_BITMAP_WORDS};

/// How long sending an answer may take: they are short, so only a source that reads nothing needs longer.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the source is waited for when the connection is closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A migration under way.
pub struct Session {
    shared: Arc<Shared>,
    reader: Reader,
    writer: Writer,
    guest: DestinationGuest,
    announced: Status,
}

impl Session {
    pub fn new(shared: Arc<Shared>, reader: Reader, writer: Writer) -> Self {
        Session { shared, reader, writer, guest: DestinationGuest::default(), announced: Status::None }
    }

    /// Carries the migration through.
    pub fn run(mut self) {
        loop {
            let (poll, status) = {
                let mut engine = self.shared.engine();
                (engine.poll(self.shared.now()), engine.status())
            };
            if status != self.announced {
                self.announced = status;
                self.shared.owner.changed(status);
            }
            match poll {
                Poll::Act(Action::End(outcome)) => return self.end(outcome),
                Poll::Act(action) => self.act(action),
                Poll::Wait(until) => match self.reader.wait(&self.shared.wake, until.map(|until| self.shared.began + until)) {
                    Ok(Awaited::Readable) => self.read(),
                    Ok(Awaited::Woken | Awaited::TimedOut) => {}
                    Err(error) => self.handle(Input::Lost(Channel::Main, error.to_string())),
                },
            }
        }
    }

    fn handle(&self, input: Input) {
        self.shared.engine().handle(input);
        self.shared.look_after_waiters();
    }

    /// Reads one frame and tells the engine, which has nothing to do before that: things are done in the order in which they came.
    fn read(&mut self) {
        match frames::read(&mut self.reader, Some(Instant::now() + FRAME_TIMEOUT)) {
            Ok(Frame::Pages(run)) => {
                if let Err(input) = self.read_pages(run) {
                    self.handle(input);
                }
            }
            Ok(frame) => self.handle(Input::Frame(Channel::Main, frame)),
            Err(error @ frames::FrameError::Wire(_)) => self.handle(Input::Failed(format!("the source's stream makes no sense: {error}"))),
            Err(error) => self.handle(Input::Lost(Channel::Main, error.to_string())),
        }
    }

    fn read_pages(&mut self, run: PageRun) -> Result<(), Input> {
        if self.shared.faults.get().is_some() {
            return faults::receive_pages(&self.shared, Channel::Main, run, &mut self.reader);
        }
        let placement = self.shared.engine().pages(Channel::Main, run).map_err(Input::Failed)?;
        if placement != Placement::Direct {
            return Err(Input::Failed(format!("{run} came too early")));
        }
        let deadline = Some(Instant::now() + FRAME_TIMEOUT);
        let received = self.guest.io().map_err(Input::Failed)?.receive(run, &mut self.reader, deadline);
        received.map_err(|error| Input::Lost(Channel::Main, error.to_string()))
    }

    fn act(&mut self, action: Action) {
        let done = match action {
            Action::Send(channel, frame) => self.send(channel, &frame),
            Action::Prepare { ram_pages, postcopy, machine } => {
                let prepared = self.guest.prepare(&*self.shared.owner, ram_pages, postcopy, &machine);
                prepared.map(|()| Some(Input::Prepared)).map_err(Input::Failed)
            }
            Action::FinishBuilding => self.guest.finish_building(&*self.shared.owner).map(|()| None).map_err(Input::Failed),
            Action::Empty(run) => self.empty(run).map(|()| None).map_err(Input::Failed),
            Action::Load(package) => self.guest.load(&self.shared, &package).map(Some).map_err(Input::Failed),
            Action::Run => Ok(Some(self.start())),
            Action::PlaceZero(run) => self.place_zero(run).map(|()| None).map_err(Input::Failed),
            Action::LoadBitmap { index, first, count, words } => {
                self.guest.bitmaps.load(index, first, count.min(MAX_BITMAP_WORDS), &words).map(|()| None).map_err(Input::Warning)
            }
            Action::CompleteBitmap(index) => self.guest.bitmaps.complete(index).map(|()| None).map_err(Input::Warning),
            Action::AbandonBitmaps => {
                self.guest.bitmaps = Default::default();
                Ok(None)
            }
            // Taken by `run`.
            Action::End(_) => Ok(None),
        };
        match done {
            Ok(None) => {}
            Ok(Some(input)) | Err(input) => self.handle(input),
        }
    }

    fn send(&mut self, channel: Channel, frame: &Frame) -> Result<Option<Input>, Input> {
        if channel == Channel::Urgent {
            return Err(Input::Failed(format!("{:?} does not belong on the urgent connection", frame.kind())));
        }
        if let Frame::Prepared | Frame::PassAck = frame {
            self.guest.ran_at = Some(Instant::now());
        }
        let sent = frames::send(&mut self.writer, frame, Some(Instant::now() + SEND_TIMEOUT));
        sent.map(|_| None).map_err(|error| Input::Lost(Channel::Main, error.to_string()))
    }

    fn empty(&self, run: PageRun) -> Result<(), String> {
        self.guest.io()?.discard(run).map_err(|error| error.to_string())
    }

    fn place_zero(&self, run: PageRun) -> Result<(), String> {
        // Without postcopy every page is there, and a zero page after the switch would be nonsense.
        let faults = self.shared.faults.get().ok_or_else(|| format!("zero {run} came after the switch, but there is no postcopy"))?;
        faults.pages.place_zero(run).map_err(|error| error.to_string())?;
        self.shared.engine().placed(run, self.shared.now());
        Ok(())
    }

    /// Hands the guest to its owner: it is ours, whether or not it can run.
    fn start(&mut self) -> Input {
        let begin = Instant::now();
        if let Err(reason) = self.guest.run(&*self.shared.owner) {
            self.handle(Input::Warning(format!("the guest is at the destination but does not run: {reason}")));
        }
        Input::Ran(begin.elapsed().as_micros() as u64)
    }

    /// Closes the connections so that nothing under way is destroyed, and lets the other threads end.
    fn end(self, outcome: Outcome) {
        let Session { shared, mut reader, mut writer, guest, .. } = self;
        // Before the fault service ends: a guest that was loaded in vain may still wait for pages until it is dropped.
        drop(guest);
        if let Some(faults) = shared.faults.get() {
            match &outcome {
                Outcome::Completed => match faults.pages.unregister() {
                    // Before the thread ends, so that nobody is left waiting.
                    Ok(()) => faults.stop(),
                    // The guest is whole; it is only watched for nothing.
                    Err(error) => eprintln!("ferry: migration: {error}"),
                },
                Outcome::Abandoned(_) => faults.stop(),
                // Goes on: the missing pages must not read as zeros.
                Outcome::Incomplete(_) => {}
            }
        }
        // The urgent connection stays until the source has closed the main one, having read our last frame: its end alone would look
        // like a loss.
        if writer.finish().is_ok() {
            drain(&mut reader, Instant::now() + CLOSE_TIMEOUT);
        }
        let _ = shared.outcome.set(outcome);
        shared.closing.raise();
    }
}
