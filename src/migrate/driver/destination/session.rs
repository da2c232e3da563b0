//! The migration's own thread at the destination.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::awake::{self, Awake};
use super::super::frames::{self, FRAME_TIMEOUT};
use super::super::populate;
use super::super::scheduling;
use super::Shared;
use super::greet::drain;
use super::guest::DestinationGuest;
use crate::migrate::destination::{Action, Input, Link, Outcome, Poll};
use crate::migrate::report::Status;
use crate::migrate::transport::{Awaited, Reader, Writer};
use crate::migrate::wire::{Channel, Frame};

/// How long sending an answer may take: they are short, so only a source that reads nothing needs longer.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the source is waited for when the connection is closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long nobody is told that the guest runs: who listens is woken, and takes time of a processor from the guest when it begins.
const QUIET: Duration = Duration::from_millis(2);

enum News {
    Resumed,
    Changed(Status),
}

/// A migration under way.
pub struct Session {
    shared: Arc<Shared>,
    link: Link,
    /// The main connection of `link`, unless it is lost.
    main: Option<(Reader, Writer)>,
    guest: DestinationGuest,
    announced: Status,
    /// What the owner is yet to be told.
    news: Vec<News>,
    /// Until then nobody hears of the guest that has come.
    quiet_until: Option<Instant>,
    /// When the guest began to run here.
    running_since: Option<Instant>,
    /// When the switch may come, and from then on.
    awake: Awake,
}

impl Session {
    pub fn new(shared: Arc<Shared>, link: Link) -> Self {
        let main = shared.links().main.take();
        Session {
            shared,
            link,
            main,
            guest: DestinationGuest::default(),
            announced: Status::None,
            news: Vec::new(),
            quiet_until: None,
            running_since: None,
            awake: Awake::default(),
        }
    }

    /// Carries the migration through.
    pub fn run(mut self) {
        while !self.shared.closing.is_raised() {
            let (poll, status) = {
                let mut engine = self.shared.engine();
                (engine.poll(self.shared.now()), engine.status())
            };
            if status != self.announced {
                self.announced = status;
                self.news.push(News::Changed(status));
            }
            if self.quiet_until.is_none_or(|end| end <= Instant::now()) {
                self.tell();
            }
            match poll {
                Poll::Act(Action::End(outcome)) => return self.end(outcome),
                Poll::Act(action) => self.act(action),
                Poll::Wait(until) => self.wait(until.map(|until| self.shared.began + until).into_iter().chain(self.quiet_until).min()),
            }
        }
    }

    fn tell(&mut self) {
        self.quiet_until = None;
        for news in self.news.drain(..) {
            match news {
                News::Resumed => self.shared.owner.resumed(),
                News::Changed(status) => self.shared.owner.changed(status),
            }
        }
    }

    fn wait(&mut self, deadline: Option<Instant>) {
        let waited = match &mut self.main {
            Some((reader, _)) => reader.wait(&self.shared.wake, deadline),
            None => self.shared.closing.wait_for_wake(&self.shared.wake, deadline).map(|()| Awaited::Woken).map_err(Into::into),
        };
        match waited {
            Ok(Awaited::Readable) => self.read(),
            Ok(Awaited::Woken | Awaited::TimedOut) => {}
            Err(error) => self.handle(Input::Lost(self.link, Channel::Main, error.to_string())),
        }
    }

    fn handle(&self, input: Input) {
        self.shared.engine().handle(input);
        self.shared.look_after_waiters();
    }

    /// Reads one frame and tells the engine, which has nothing to do before that: things are done in the order in which they came.
    fn read(&mut self) {
        let Some((reader, _)) = &mut self.main else { return };
        let deadline = Some(Instant::now() + FRAME_TIMEOUT);
        let pages = self.shared.io().as_ref().map(|(_, blocks)| blocks.layout().pages());
        let frame = match pages {
            Some(pages) => frames::read(reader, frames::from_source(pages), deadline),
            None => frames::read(reader, frames::from_new_source, deadline),
        };
        match frame {
            Ok(frame) => self.handle(Input::Frame(self.link, Channel::Main, frame)),
            Err(error @ (frames::FrameError::Wire(_) | frames::FrameError::OutOfPlace { .. })) => {
                self.handle(Input::Nonsense(self.link, format!("the source's stream makes no sense: {error}")))
            }
            Err(error) => self.handle(Input::Lost(self.link, Channel::Main, error.to_string())),
        }
    }

    fn act(&mut self, action: Action) {
        let done = match action {
            Action::Send(channel, frame) => self.send(channel, &frame),
            Action::Prepare(setup) => self.guest.prepare(&self.shared, setup).map(|()| Some(Input::Prepared)).map_err(Input::Failed),
            Action::BeginBuilding => self.guest.begin_building(&self.shared).map(|()| None).map_err(Input::Failed),
            Action::FinishBuilding => self.guest.finish_building().map(|()| None).map_err(Input::Failed),
            Action::Load(package) => {
                self.awake.during(awake::MOST);
                self.guest.load(&self.shared, &package).map(Some).map_err(Input::Failed)
            }
            Action::FlushDisks => self.guest.flush_disks().map(|()| Some(Input::DisksFlushed)).map_err(Input::DisksNotFlushed),
            Action::Run => Ok(Some(self.start())),
            Action::LoadBitmap { index, first, run } => self.guest.bitmaps.load(index, first, &run).map(|()| None).map_err(Input::Warning),
            Action::CompleteBitmap(index) => self.guest.bitmaps.complete(index).map(|()| None).map_err(Input::Warning),
            Action::AbandonBitmaps => {
                self.guest.bitmaps = Default::default();
                Ok(None)
            }
            Action::Disconnect(reason) => {
                self.disconnect(reason);
                Ok(None)
            }
            Action::Reconnect(link) => {
                self.reconnect(link);
                Ok(None)
            }
            Action::Complete => {
                self.complete();
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
        if channel != Channel::Main {
            return Err(Input::Failed(format!("{:?} does not belong on the {channel:?} connection", frame.kind())));
        }
        // What the source says to these may be the switch.
        let may_switch = matches!(frame, Frame::Prepared | Frame::PassAck);
        if may_switch {
            self.guest.ran_at = Some(Instant::now());
        }
        // Of a link that was lost meanwhile, which the engine knows.
        let Some((_, writer)) = &mut self.main else { return Ok(None) };
        let sent = frames::send(writer, frame, Some(Instant::now() + SEND_TIMEOUT));
        if may_switch {
            scheduling::is_switching();
            populate::heap_and_stack(populate::TO_LOAD);
            self.awake.during(awake::SWITCH);
        }
        sent.map(|_| None).map_err(|error| Input::Lost(self.link, Channel::Main, error.to_string()))
    }

    fn disconnect(&mut self, reason: String) {
        self.main = None;
        let links = self.shared.links();
        match &links.current {
            // The urgent connection goes with it.
            Some((link, interrupt)) if *link == self.link => interrupt.raise(),
            // Replaced, and interrupted by who did it.
            _ => {}
        }
        drop(links);
        self.shared.look_after_waiters();
        self.tell();
        // It may be back already.
        if self.shared.engine().is_paused() {
            self.shared.owner.paused(reason);
        }
    }

    fn reconnect(&mut self, link: Link) {
        let mut links = self.shared.links();
        if links.current.as_ref().is_some_and(|(current, _)| *current == link) {
            self.link = link;
            self.main = links.main.take();
        }
    }

    /// All of the guest is here.
    fn complete(&mut self) {
        self.tell();
        // After a precopy that is now, when the guest takes its first steps here; what follows, on both sides, works and interrupts for some
        // milliseconds where it may want to run. The source has been told, and does not go before this side does.
        if let Some(rest) = self.running_since.and_then(|since| QUIET.checked_sub(since.elapsed())) {
            std::thread::sleep(rest);
        }
        // Nobody waits any more, and huge pages are made in a thread that works long.
        scheduling::is_ordinary();
        if let Some(faults) = self.shared.faults.get() {
            match faults.pages.unregister() {
                // Before the thread ends, so that nobody is left waiting.
                Ok(()) => faults.end(),
                // The guest is whole; it is only watched for nothing.
                Err(error) => eprintln!("ferry: migration: {error}"),
            }
        }
        self.guest.restore_huge_pages(&self.shared);
        self.shared.owner.ended(Outcome::Completed);
    }

    /// Hands the guest to its owner: it is ours, whether or not it can run.
    fn start(&mut self) -> Input {
        let begin = Instant::now();
        let run = self.guest.run(&*self.shared.owner);
        let now = Instant::now();
        self.running_since = Some(now);
        self.quiet_until = Some(now + QUIET);
        if run == Ok(true) {
            self.news.push(News::Resumed);
        }
        if let Err(reason) = run {
            self.handle(Input::Warning(format!("the guest is at the destination but does not run: {reason}")));
        }
        Input::Ran(begin.elapsed().as_micros() as u64)
    }

    /// Closes the connections so that nothing under way is destroyed, and lets the other threads end.
    fn end(mut self, outcome: Outcome) {
        self.tell();
        let Session { shared, main, guest, .. } = self;
        // Before the fault service ends: a guest that was loaded in vain may still wait for pages until it is dropped.
        drop(guest);
        *shared.io() = None;
        if let (Outcome::Abandoned(_), Some(faults)) = (&outcome, shared.faults.get()) {
            faults.stop();
        }
        if outcome == Outcome::DryRun {
            // Before the source can know of the end: its next connection is for whoever listens next.
            shared.closing.raise();
        }
        // The urgent connection stays until the source has closed the main one, having read our last frame: its end alone would look
        // like a loss.
        if let Some((mut reader, mut writer)) = main
            && writer.finish().is_ok()
        {
            drain(&mut reader, Instant::now() + CLOSE_TIMEOUT);
        }
        shared.close();
        // Not when all had come: that is a moment after the guest began to run, and each piece that is unmapped interrupts all threads of
        // this process, the vCPUs' among them.
        populate::give_back();
        // A migration that has completed was told when it did.
        if outcome != Outcome::Completed {
            shared.owner.ended(outcome);
        }
    }
}
