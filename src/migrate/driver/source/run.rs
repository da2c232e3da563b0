//! The migration's own thread at the source.

use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, Sender, at, bounded, never, select};

use super::super::awake::{self, Awake};
use super::super::block_io::BlockIo;
use super::super::frames::{self, FRAME_TIMEOUT, FrameError};
use super::super::owner::SourceOwner;
use super::super::page_io::PageIo;
use super::super::populate;
use super::super::scheduling;
use super::Shared;
use super::bulk::{Batch, PageSender};
use super::guest::{SourceGuest, StopError};
use super::links;
use crate::block::dirty_bitmap::RunLimits;
use crate::memory::{GuestRam, HostPage, PageRun, PageSet};
use crate::migrate::report::Status;
use crate::migrate::source::{Action, Bulk, Input, Outcome, Poll, Source};
use crate::migrate::transport::{Address, Closer, Connection, Interrupt, LinkError, Reader, Writer, connect};
use crate::migrate::wire::{Channel, Frame};

/// How long the destination may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Background data that may wait unsent in the kernel, in bytes: enough to keep a link busy, little for an urgent page to queue behind.
const MAX_UNSENT: u32 = 256 << 10;
/// Batches that wait for each connection for pages: enough for it to go on while the next one is looked for.
const BATCHES: usize = 2;
/// Inputs that readers may be ahead by.
const INPUTS: usize = 16;
/// How long the destination is waited for when a connection is closed, and the last words of it when a send failed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long nobody is told of a switch that is under way: who listens is woken, and takes time of a processor from those who work on it.
/// Longer than most take, and short for a person who is to hear of one that does not come to its end. A send that is held up adds to it.
const QUIET: Duration = Duration::from_millis(5);
/// The same from when the guest runs at the destination. In precopy everything is there a moment later, which is told together with the rest.
const QUIET_AFTER: Duration = Duration::from_millis(1);
/// How long sending may take while the guest stands still, beside three times the accepted blackout; then it goes on here.
const STANDSTILL_TIMEOUT: Duration = Duration::from_secs(10);

/// The migration's thread.
pub struct Migration {
    shared: Arc<Shared>,
    owner: Arc<dyn SourceOwner>,
    io: PageIo,
    blocks: BlockIo,
    guest: SourceGuest,
    /// The main connection, unless it is broken: then part of a frame may have been sent, so nothing can follow.
    main: Option<Writer>,
    /// Ends all waits on the connections of the link that stands.
    closing: Option<Interrupt>,
    /// Of the connections for pages, by their numbers.
    senders: Vec<(Sender<Batch>, Closer)>,
    threads: Vec<JoinHandle<()>>,
    inputs: Receiver<Input>,
    /// The reader of the main connection has come to its end.
    main_ended: bool,
    /// For readers to come.
    input_sender: Sender<Input>,
    woken: Receiver<()>,
    announced: (Status, u32),
    /// What the owner is yet to be told, of what was announced.
    news: Vec<(Status, u32)>,
    /// Until then nobody hears of the switch.
    quiet_until: Option<Instant>,
    to_clear: PageSet,
    /// When the guest has stood still for too long.
    standstill: Option<Instant>,
    /// From the switch on.
    awake: Awake,
}

impl Migration {
    pub fn new(
        shared: Arc<Shared>,
        owner: Arc<dyn SourceOwner>,
        ram: GuestRam,
        blocks: BlockIo,
        guest: SourceGuest,
        woken: Receiver<()>,
    ) -> Self {
        let (input_sender, inputs) = bounded(INPUTS);
        Migration {
            shared,
            owner,
            to_clear: PageSet::empty(ram.pages()),
            io: PageIo::new(ram),
            blocks,
            guest,
            main: None,
            closing: None,
            senders: Vec::new(),
            threads: Vec::new(),
            inputs,
            main_ended: false,
            input_sender,
            woken,
            announced: (Status::None, 0),
            news: Vec::new(),
            quiet_until: None,
            standstill: None,
            awake: Awake::default(),
        }
    }

    /// Carries the migration through.
    pub fn run(mut self) {
        scheduling::is_switching();
        loop {
            while let Ok(input) = self.inputs.try_recv() {
                self.take(input);
            }
            let poll = self.shared.engine().poll(self.shared.now());
            // Who hears of the pause finds that it has taken place.
            if !matches!(poll, Poll::Act(Action::Disconnect(_))) {
                self.announce();
            }
            match poll {
                Poll::Act(Action::End(outcome)) => return self.end(*outcome),
                Poll::Act(action) => self.act(action),
                Poll::Bulk(Bulk::Pages { channel, runs, clear, unit }) => self.send_pages(channel, runs, clear, unit),
                Poll::Bulk(Bulk::Bitmap { index, first, limits }) => self.send_bitmap(index, first, limits),
                Poll::Wait(until) => {
                    self.wait(until.map(|until| self.shared.began + until).into_iter().chain(self.quiet_until).min());
                    // Nobody is late while a person is waited for.
                    if self.announced.0 == Status::PreSwitchover {
                        self.limit_standstill();
                    }
                }
            }
        }
    }

    /// Tells the owner what has changed, at once or when the switch is over.
    fn announce(&mut self) {
        let current = self.shared.engine().stage();
        if current != self.announced {
            self.announced = current;
            self.news.push(current);
        }
        if self.quiet_until.is_none_or(|end| end <= Instant::now()) {
            self.tell();
        }
    }

    fn tell(&mut self) {
        self.quiet_until = None;
        self.guest.tell_of_stop();
        self.news.drain(..).for_each(|(status, pass)| self.owner.changed(status, pass));
    }

    /// Passes what another thread reports on to the engine.
    fn take(&mut self, input: Input) {
        self.main_ended |= matches!(input, Input::Lost(Channel::Main, _));
        if let Input::Frame(Frame::Running(_)) = input {
            let after = Instant::now() + QUIET_AFTER;
            self.quiet_until = self.quiet_until.map(|end| end.min(after));
        }
        match input {
            Input::Lost(channel @ Channel::Pages(_), reason) => self.send_failed(channel, &reason),
            input => self.shared.handle(input),
        }
    }

    /// Waits for an input, a wake or `deadline`.
    fn wait(&mut self, deadline: Option<Instant>) {
        select! {
            recv(self.inputs) -> input => if let Ok(input) = input { self.take(input) },
            recv(self.woken) -> _ => {}
            recv(deadline.map_or_else(never, at)) -> _ => {}
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(frame) => {
                if let Some(bytes) = self.send(&frame) {
                    self.shared.engine().sent_frame(&frame, bytes);
                }
                if let Frame::Setup(_) | Frame::PassEnd(_) = frame {
                    // The answer to it is the last thing before the switch.
                    populate::heap_and_stack(populate::TO_SAVE);
                }
            }
            Action::Connect => {
                if let Err(reason) = self.open_main() {
                    self.shared.handle(Input::Failed(reason));
                }
            }
            Action::Disconnect(text) => {
                self.disconnect();
                self.tell();
                self.owner.paused(text);
            }
            Action::OpenOthers => {
                if let Err(reason) = self.open_urgent().and_then(|()| self.open_for_pages()) {
                    self.shared.handle(Input::Failed(reason));
                }
            }
            Action::StartTracking => {
                let populated = self.guest.start_tracking();
                self.shared.handle(populated.map_or_else(Input::Failed, Input::Harvested));
            }
            Action::Harvest => {
                // The switch may follow.
                self.awake.during(awake::SWITCH);
                let dirty = self.guest.harvest();
                self.shared.handle(dirty.map_or_else(Input::Failed, Input::Harvested));
            }
            Action::Watch => {
                let dirty = self.guest.watch();
                self.shared.handle(dirty.map_or_else(Input::Failed, Input::Harvested));
            }
            Action::Throttle(percent) => {
                if let Err(reason) = self.guest.throttle(percent) {
                    self.shared.handle(Input::Failed(reason));
                }
            }
            Action::Stop => {
                self.awake.during(awake::MOST);
                let companions = self.shared.engine().companions();
                let stopped = self.guest.stop(companions);
                self.limit_standstill();
                self.quiet_until = Some(Instant::now() + QUIET);
                match stopped {
                    Ok(stopped) => self.shared.handle(Input::Stopped(Box::new(stopped))),
                    Err(StopError::Failed(reason)) => self.shared.handle(Input::StopFailed(reason)),
                    Err(StopError::Ended(event)) => {
                        self.shared.handle(super::input_of(&event));
                        self.shared.handle(Input::StopFailed(event.to_string()));
                    }
                }
            }
            Action::Resume => {
                self.standstill = None;
                self.awake.end();
                self.tell();
                if let Err(reason) = self.guest.resume() {
                    self.shared.handle(Input::ResumeFailed(reason));
                }
            }
            Action::GiveUp => self.give_up(),
            // Taken by `run`.
            Action::End(_) => {}
        }
    }

    /// Counts from now how long the guest has stood still.
    fn limit_standstill(&mut self) {
        let limit = self.shared.engine().downtime_limit();
        self.standstill = Some(Instant::now() + STANDSTILL_TIMEOUT + limit * 3);
    }

    /// Until when a send may be blocked: while the guest runs here, for ever, since a cancel ends it.
    fn send_deadline(&self) -> Option<Instant> {
        self.standstill.or_else(|| self.shared.engine().is_committed().then(|| Instant::now() + FRAME_TIMEOUT))
    }

    /// The commit point. Whatever has come after READY (the loss of a connection, or nonsense) is a reason not to pass it.
    fn give_up(&mut self) {
        let inputs = &self.inputs;
        let given_up = self.guest.give_up(|| match inputs.try_recv().ok()? {
            Input::Lost(_, reason) => Some(format!("the connection to the destination was lost: {reason}")),
            Input::Failed(reason) => Some(reason),
            Input::Frame(Frame::Abort(reason)) => Some(format!("the destination says: {reason}")),
            _ => Some("the destination spoke out of turn".into()),
        });
        self.standstill = None;
        match given_up {
            // No cancel comes any more, but one that came just before must not cut the commit.
            Ok(()) => self.main = self.main.take().map(|writer| self.uncancelled(writer)),
            Err(reason) => self.shared.handle(Input::GiveUpFailed(reason)),
        }
    }

    /// `writer`, whose waits a cancel ends no more.
    fn uncancelled(&self, writer: Writer) -> Writer {
        match &self.closing {
            Some(closing) => writer.interrupted_by(closing),
            None => writer,
        }
    }

    fn address(&self) -> Address {
        self.shared.address.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn open_main(&mut self) -> Result<(), String> {
        self.closing = Some(Interrupt::new().map_err(|error| format!("cannot open a connection: {error}"))?);
        let (reader, writer) = self.connect()?.split();
        let committed = self.shared.engine().is_committed();
        self.main = Some(if committed { writer } else { writer.interrupted_by(&self.shared.cancel) });
        let (inputs, pages) = (self.input_sender.clone(), self.blocks.layout().pages());
        self.spawn("migration-read", move || links::read_main(reader, pages, &inputs))
    }

    fn open_urgent(&mut self) -> Result<(), String> {
        let (reader, writer) = self.greet(Channel::Urgent, self.connect()?)?;
        let (shared, io, blocks, inputs) = (self.shared.clone(), self.io.clone(), self.blocks.clone(), self.input_sender.clone());
        self.spawn("migration-urgent", move || links::serve_requests(&shared, &io, &blocks, reader, writer, &inputs))
    }

    fn open_for_pages(&mut self) -> Result<(), String> {
        for index in 0..self.shared.pages.channels {
            let connection = self.connect()?;
            connection.limit_unsent(MAX_UNSENT).map_err(|error| format!("cannot set up a connection: {error}"))?;
            let (channel, closer) = (Channel::Pages(index), connection.closer());
            let (reader, writer) = self.greet(channel, connection)?;
            let (batches, taken) = bounded(BATCHES);
            self.senders.push((batches, closer));
            let sender = PageSender::new(self.shared.clone(), self.io.clone(), self.blocks.clone(), channel, writer);
            let (sends, watches) = (self.input_sender.clone(), self.input_sender.clone());
            self.spawn("migration-pages", move || sender.run(&taken, &sends))?;
            self.spawn("migration-watch", move || links::watch(channel, reader, &watches))?;
        }
        Ok(())
    }

    /// Says on `connection` what it is.
    fn greet(&self, channel: Channel, connection: Connection) -> Result<(Reader, Writer), String> {
        let (reader, mut writer) = connection.split();
        let hello = Source::hello(self.shared.session, self.shared.engine().link(), channel);
        let greeted = frames::send(&mut writer, &hello, Some(Instant::now() + CONNECT_TIMEOUT));
        let bytes = greeted.map_err(|error| format!("{channel:?} connection to {}: {error}", self.address()))?;
        self.shared.engine().sent_frame(&hello, bytes);
        Ok((reader, writer))
    }

    /// A new connection of this link.
    fn connect(&self) -> Result<Connection, String> {
        let closing = self.closing.as_ref().ok_or("the connection was closed")?;
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let connection = connect(&self.address(), &self.shared.cancel, Some(deadline)).map_err(|error| error.to_string())?;
        Ok(connection.interrupted_by(closing))
    }

    /// Closes the connections and ends their threads; nothing that they have reported is heard any more.
    fn disconnect(&mut self) {
        self.main = None;
        if let Some(closing) = self.closing.take() {
            closing.raise();
        }
        // Up to here they stay open, whatever becomes of their threads: the destination would take their end for a loss.
        self.senders.drain(..).for_each(|(_, closer)| closer.shutdown());
        // A thread that is ahead finds the channel closed.
        (self.input_sender, self.inputs) = bounded(INPUTS);
        for thread in self.threads.drain(..) {
            // A panic of the thread was printed when it happened.
            let _ = thread.join();
        }
        self.main_ended = false;
    }

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), String> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(body);
        self.threads.push(thread.map_err(|error| format!("cannot start a thread: {error}"))?);
        Ok(())
    }

    /// Sends `frame` on the main connection, if that can still be; returns its length in bytes.
    fn send(&mut self, frame: &Frame) -> Option<u64> {
        let mut writer = self.main.take()?;
        let mut deadline = self.send_deadline();
        if let Frame::Abort(_) = frame {
            // A courtesy, which a cancel before it must not end.
            writer = self.uncancelled(writer);
            deadline = Some(Instant::now() + CLOSE_TIMEOUT);
        } else if self.shared.cancel.is_raised() && !self.shared.engine().is_committed() {
            // The engine knows of the cancel, and what it says next is to tell the destination.
            self.main = Some(writer);
            return None;
        }
        match frames::send(&mut writer, frame, deadline) {
            Ok(bytes) => {
                self.main = Some(writer);
                Some(bytes)
            }
            Err(FrameError::Link(LinkError::Interrupted)) => {
                // By a cancel, of which the engine knows.
                self.main = Some(writer);
                None
            }
            Err(error) => {
                self.send_failed(Channel::Main, &error.to_string());
                None
            }
        }
    }

    fn send_bitmap(&mut self, index: u32, first: u64, limits: RunLimits) {
        let throttled = self.throttle();
        if !self.is_linked() {
            return;
        }
        let Some(run) = self.guest.bitmap_run(index, first, limits) else {
            return self.shared.handle(Input::Failed(format!("dirty bitmap {index} is not here")));
        };
        let words = run.count();
        if let Some(bytes) = self.send(&Frame::Bitmap { index, first, run }) {
            if let Some(committed) = throttled {
                self.shared.pace(committed).delay(self.shared.now(), bytes);
            }
            self.shared.engine().sent_bitmap(words, bytes);
        }
    }

    fn send_pages(&mut self, channel: Channel, runs: Vec<PageRun>, clear: Option<PageRun>, unit: HostPage) {
        let charged = self.throttle().map(|committed| {
            // In full, and before it is sent: batches that wait for their turn must not all go at once.
            let bytes = runs.iter().map(|run| run.bytes()).sum();
            self.shared.pace(committed).delay(self.shared.now(), bytes);
            (committed, bytes)
        });
        if !self.is_linked() {
            // It has ended meanwhile, or a recovery will make up for it.
            return;
        }
        if let Some(range) = clear {
            {
                let engine = self.shared.engine();
                engine.unsent().runs_within(range).for_each(|run| {
                    self.to_clear.insert(run);
                });
            }
            runs.iter().for_each(|run| {
                self.to_clear.insert(*run);
            });
            let cleared = self.guest.clear(&self.to_clear, range);
            self.to_clear.remove(range);
            if let Err(reason) = cleared {
                return self.shared.handle(Input::Failed(reason));
            }
        }
        // After the bits were cleared: a write from here on shows in the next harvest.
        self.hand_out(channel, Batch { runs, unit, charged, deadline: self.send_deadline() });
    }

    /// Gives `batch` to the thread of its connection as soon as that has room. If the migration ends or pauses before, it is dropped: a
    /// recovery makes up for it.
    fn hand_out(&mut self, channel: Channel, batch: Batch) {
        let Channel::Pages(index) = channel else { return };
        let Some(batches) = self.senders.get(usize::from(index)).map(|(batches, _)| batches.clone()) else { return };
        let mut batch = Some(batch);
        while self.is_linked() {
            let Some(next) = batch.take() else { return };
            let mut select = Select::new();
            let (send, input) = (select.send(&batches), select.recv(&self.inputs));
            select.recv(&self.woken);
            let ready = select.select();
            match ready.index() {
                index if index == send => {
                    // Fails when the thread has ended, which it has reported.
                    if ready.send(&batches, next).is_err() {
                        self.wait(None);
                    }
                    return;
                }
                index if index == input => {
                    batch = Some(next);
                    if let Ok(input) = ready.recv(&self.inputs) {
                        self.take(input);
                    }
                }
                _ => {
                    batch = Some(next);
                    let _ = ready.recv(&self.woken);
                }
            }
        }
    }

    /// Waits until what was sent so far is paid for. Returns whose limit that was: of the time after the commit, or before; nothing where
    /// there is none.
    fn throttle(&mut self) -> Option<bool> {
        loop {
            let engine = self.shared.engine();
            let (throttled, committed) = (engine.may_throttle(), engine.is_committed());
            drop(engine);
            if !throttled {
                return None;
            }
            let delay = self.shared.pace(committed).delay(self.shared.now(), 0);
            if delay.is_zero() {
                return Some(committed);
            }
            // Any input may change what is to be done, and what took less than it was charged for comes back.
            self.wait(Some(Instant::now() + delay));
        }
    }

    /// Whether the engine still counts on the connections.
    fn is_linked(&self) -> bool {
        let engine = self.shared.engine();
        !engine.is_over() && !engine.is_paused()
    }

    /// A send failed. The destination may have said why before it closed the connection, so its words are waited for.
    fn send_failed(&mut self, channel: Channel, reason: &str) {
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        while self.is_linked() {
            match self.inputs.recv_deadline(deadline) {
                // The others go the same way.
                Ok(Input::Lost(Channel::Pages(_), _)) => {}
                Ok(input) => self.take(input),
                // If the engine counts on a connection still, it is one that a person has already asked for.
                Err(_) => return self.shared.handle(Input::Lost(channel, reason.into())),
            }
        }
    }

    /// Closes the connections so that nothing under way is destroyed, ends the threads and reports.
    fn end(mut self, outcome: Outcome) {
        self.tell();
        if let Outcome::Completed(report) = &outcome {
            self.owner.completed(report.clone(), self.guest.stale_images());
        }
        if let Some(mut writer) = self.main.take()
            && writer.finish().is_ok()
        {
            // What the destination still sends is read away: closing with unread data would reset the connection and destroy our last
            // words on their way.
            let deadline = Instant::now() + CLOSE_TIMEOUT;
            while !self.main_ended
                && let Ok(input) = self.inputs.recv_deadline(deadline)
            {
                self.take(input);
            }
        }
        self.disconnect();
        self.awake.end();
        // Whether it heard why cannot be known; one that did listens no more.
        if self.shared.engine().may_be_waited_for() {
            links::settle(&self.shared, &self.address());
        }
        let moved = self.guest.end();
        if moved.is_none() {
            populate::give_back();
        }
        self.owner.ended(outcome, moved);
    }
}
