//! The destination's side of a migration as a state machine without sockets and without a clock.
//!
//! Several threads use it, one at a time. The reader of the main connection alone calls [`Destination::poll`] and does what it says, so
//! that things are done in order; the reader of the urgent connection and the server of page faults report to it and wake it.
//!
//! ```text
//!  Hello --> Setup --Setup--> Preparing --prepared--> Receiving --Switchover--> Loading --loaded, READY--> Ready
//!  Ready --COMMIT--> Starting --vCPUs run, RUNNING--> Running --End, nothing missing--> Ended
//! ```
//!
//! Before `COMMIT` every failure ends with [`Outcome::Abandoned`]: nothing ran here. After it the guest is ours, whatever happens.

use std::collections::VecDeque;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::bitmaps::IncomingBitmaps;
use super::pages::{FaultAnswer, Incoming};
use super::report::{Faults, Status};
use super::wire::{Channel, Frame, Hello, MAX_BITMAP_WORDS, MAX_RUN, Package, Totals};
use crate::memory::{PageNumber, PageRun, PageSet};

/// Longest guest RAM, in pages: what a 48-bit physical address space can hold.
const MAX_RAM_PAGES: u64 = 1 << 36;
/// How long the source may take from its `Hello` to its `Setup`.
const SETUP_TIMEOUT: Duration = Duration::from_secs(30);

/// What the driver tells the destination.
#[derive(Clone, Debug)]
pub enum Input {
    /// A frame came on a connection, `Hello` and `Pages` excepted.
    Frame(Channel, Frame),
    /// The host can run the guest and RAM of the asked size is there: the answer to [`Action::Prepare`].
    Prepared,
    /// The package is loaded: the answer to [`Action::Load`].
    Loaded {
        /// How long it took, in microseconds.
        load_us: u64,
        /// What went wrong without harming the guest.
        warnings: Vec<String>,
    },
    /// The vCPUs run: the answer to [`Action::Run`], with the time it took in microseconds.
    Ran(u64),
    /// Something could not be done here, said so that the person at the source understands it.
    Failed(String),
    /// Something went wrong that does not harm the guest; the person at the source is told at the end.
    Warning(String),
    /// A connection is gone.
    Lost(Channel, String),
}

/// What the driver is to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Poll {
    /// Do this.
    Act(Action),
    /// Nothing until the next input, or until this time.
    Wait(Option<Duration>),
}

/// Things to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send on a connection.
    Send(Channel, Frame),
    /// Check host and disks, allocate RAM and begin to build the machine; answer with [`Input::Prepared`] or [`Input::Failed`].
    Prepare {
        /// RAM size in pages.
        ram_pages: u64,
        /// Whether userfaultfd must work.
        postcopy: bool,
        /// The machine's configuration and needs.
        machine: Vec<u8>,
    },
    /// Wait until the machine is built: what is to be acknowledged next allows the source to stop the guest.
    FinishBuilding,
    /// These pages, written before, are zero now: empty them.
    Empty(PageRun),
    /// Discard every page in `package.missing`: of some an old version is in place, and of others a zero page, because a transparent
    /// huge page came into being around a neighbour. Serve page faults if `package.postcopy` (before anything is restored, because
    /// restoring can fault), create the bitmaps, load the state; answer with [`Input::Loaded`].
    Load(Box<Package>),
    /// Take the disks' locks and run the guest; answer with [`Input::Ran`].
    Run,
    /// Place zero pages by userfaultfd and report them with [`Destination::placed`].
    PlaceZero(PageRun),
    /// Put words into a bitmap; where `words` is empty there is nothing to set.
    LoadBitmap {
        /// Index in the package.
        index: u32,
        /// First word.
        first: u64,
        /// How many words.
        count: u64,
        /// The words.
        words: Vec<u64>,
    },
    /// Merge the successor of this bitmap back: all bits have come.
    CompleteBitmap(u32),
    /// Drop the bitmaps that are not complete: the source is gone. A wrong bitmap would be worse than none.
    AbandonBitmaps,
    /// The migration is over for this side. Nothing follows.
    End(Outcome),
}

/// How it ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The guest is whole and runs here.
    Completed,
    /// Nothing runs here; with the reason.
    Abandoned(String),
    /// The guest runs here, but pages are missing and the source is gone; with the reason.
    Incomplete(String),
}

/// Where the contents of pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Straight into guest RAM: nobody looks at it yet.
    Direct,
    /// By userfaultfd, which wakes who waits; report it with [`Destination::placed`].
    Fault,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Hello,
    Setup,
    Preparing,
    Receiving,
    Loading,
    Ready,
    Starting,
    Running,
    Ended,
}

/// The destination's state machine.
#[derive(Debug)]
pub struct Destination {
    state: State,
    actions: VecDeque<Action>,
    deadline: Option<Duration>,
    session: Option<u128>,
    urgent: bool,
    prepared: bool,
    ram_pages: u64,
    /// Pages whose contents were written into RAM during precopy.
    written: PageSet,
    received: Totals,
    incoming: Incoming,
    bitmaps: IncomingBitmaps,
    postcopy: bool,
    end_received: bool,
    warnings: Vec<String>,
    faults: Faults,
    latencies: Option<Histogram<u64>>,
    outcome: Option<Outcome>,
}

impl Default for Destination {
    fn default() -> Self {
        Self::new()
    }
}

impl Destination {
    /// Waits for a source.
    pub fn new() -> Self {
        Destination {
            state: State::Hello,
            actions: VecDeque::new(),
            deadline: None,
            session: None,
            urgent: false,
            prepared: false,
            ram_pages: 0,
            written: PageSet::empty(0),
            received: Totals::default(),
            incoming: Incoming::new(PageSet::empty(0)),
            bitmaps: IncomingBitmaps::default(),
            postcopy: false,
            end_received: false,
            warnings: Vec::new(),
            faults: Faults::default(),
            // One microsecond to ten minutes, two digits.
            latencies: Histogram::new_with_bounds(1, 600_000_000, 2).ok(),
            outcome: None,
        }
    }

    /// A connection says what it is. An error refuses that connection, with words for its other end, and harms no migration under way.
    pub fn hello(&mut self, hello: &Hello, now: Duration) -> Result<(), String> {
        match (hello.channel, self.session) {
            (Channel::Main, None) if self.state == State::Ended => Err("this side has given up waiting for a migration".into()),
            (Channel::Main, None) => {
                self.session = Some(hello.session);
                self.send(Channel::Main, Frame::Welcome(concat!("ferry ", env!("CARGO_PKG_VERSION")).into()));
                self.enter(State::Setup, Some(now + SETUP_TIMEOUT));
                Ok(())
            }
            (Channel::Main, Some(_)) => Err("another migration to here is under way".into()),
            (Channel::Urgent, Some(session)) if session == hello.session && !self.urgent => {
                self.urgent = true;
                self.check_prepared();
                Ok(())
            }
            (Channel::Urgent, _) => Err("this urgent connection belongs to no migration to here".into()),
        }
    }

    /// Where the migration stands, in QEMU's words.
    pub fn status(&self) -> Status {
        match self.state {
            State::Hello => Status::None,
            State::Setup | State::Preparing => Status::Setup,
            State::Receiving | State::Loading | State::Ready | State::Starting => Status::Active,
            State::Running => Status::PostcopyActive,
            State::Ended => match self.outcome {
                Some(Outcome::Completed) => Status::Completed,
                Some(Outcome::Incomplete(_)) => Status::PostcopyPaused,
                _ => Status::Failed,
            },
        }
    }

    /// Whether the guest is this side's.
    pub fn is_committed(&self) -> bool {
        matches!(self.state, State::Starting | State::Running) || matches!(self.outcome, Some(Outcome::Completed | Outcome::Incomplete(_)))
    }

    /// Pages that have not come yet, in postcopy.
    pub fn missing(&self) -> &PageSet {
        self.incoming.missing()
    }

    /// Pages that somebody in the guest waits for, longest waiting first.
    pub fn waiting(&self) -> Vec<PageNumber> {
        self.incoming.waiting()
    }

    /// What to do next.
    pub fn poll(&mut self, now: Duration) -> Poll {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.fail("the source said nothing in time");
        }
        self.check_complete();
        match self.actions.pop_front() {
            Some(Action::End(Outcome::Incomplete(reason))) => Poll::Act(Action::End(self.count_missing(reason))),
            Some(action) => Poll::Act(action),
            None => Poll::Wait(self.deadline),
        }
    }

    /// What the loss for this reason comes to, now that everything that had come is placed.
    fn count_missing(&mut self, reason: String) -> Outcome {
        let outcome = match self.incoming.missing().len() {
            0 => Outcome::Completed,
            missing => Outcome::Incomplete(format!("{reason}; {missing} pages are missing")),
        };
        self.outcome = Some(outcome.clone());
        outcome
    }

    /// Takes an input. What follows from it comes with the next [`Destination::poll`].
    pub fn handle(&mut self, input: Input) {
        match (input, self.state) {
            (_, State::Ended) => {}
            (Input::Frame(Channel::Main, frame), _) => self.on_frame(frame),
            (Input::Frame(Channel::Urgent, frame), _) => {
                self.fail(&format!("the source sent {:?} on the urgent connection", frame.kind()));
            }
            (Input::Prepared, State::Preparing) => {
                self.prepared = true;
                // Only now: a size that this host has no RAM for must not cost anything.
                self.written = PageSet::empty(self.ram_pages);
                self.check_prepared();
            }
            (Input::Loaded { load_us, warnings }, State::Loading) => {
                self.send(Channel::Main, Frame::Ready { load_us, warnings });
                self.enter(State::Ready, None);
            }
            (Input::Ran(resume_us), State::Starting) => {
                self.send(Channel::Main, Frame::Running(resume_us));
                self.enter(State::Running, None);
            }
            (Input::Prepared | Input::Loaded { .. } | Input::Ran(_), _) => {}
            (Input::Warning(warning), _) => self.warnings.push(warning),
            (Input::Failed(reason), _) => self.fail(&reason),
            (Input::Lost(_, reason), _) => self.fail(&format!("the connection to the source was lost: {reason}")),
        }
    }

    /// The contents of `run` are about to be read from `channel`; says where they go. An error is the source's fault.
    pub fn pages(&mut self, channel: Channel, run: PageRun) -> Result<Placement, String> {
        if !run.is_within(self.ram_pages) || run.count > MAX_RUN {
            return Err(format!("the source sent {run} of {}", self.ram_pages));
        }
        match (self.state, channel) {
            (State::Receiving, Channel::Main) => {
                self.written.insert(run);
                self.received.normal += run.count;
                Ok(Placement::Direct)
            }
            (State::Running, Channel::Main) if self.postcopy => Ok(Placement::Fault),
            (State::Loading | State::Ready | State::Starting | State::Running | State::Ended, Channel::Urgent) if self.postcopy => {
                Ok(Placement::Fault)
            }
            (state, _) => Err(format!("the source sent {run} on the {channel:?} connection in state {state:?}")),
        }
    }

    /// Pages have been placed by userfaultfd.
    pub fn placed(&mut self, run: PageRun, now: Duration) {
        for latency in self.incoming.placed(run, now) {
            if let Some(latencies) = &mut self.latencies {
                latencies.saturating_record(latency.as_micros() as u64);
            }
        }
    }

    /// Somebody touched a missing page.
    pub fn fault(&mut self, page: PageNumber, now: Duration) -> FaultAnswer {
        let answer = self.incoming.fault(page, now);
        match answer {
            FaultAnswer::Request(run) => self.faults.requested += run.count,
            FaultAnswer::Zero(_) => self.faults.local += 1,
            FaultAnswer::Wait => {}
        }
        answer
    }

    /// Pages may come when the host is ready and the urgent connection stands: postcopy must not begin before it.
    fn check_prepared(&mut self) {
        if self.state == State::Preparing && self.prepared && self.urgent {
            self.send(Channel::Main, Frame::Prepared);
            self.enter(State::Receiving, None);
        }
    }

    fn send(&mut self, channel: Channel, frame: Frame) {
        self.actions.push_back(Action::Send(channel, frame));
    }

    fn enter(&mut self, state: State, deadline: Option<Duration>) {
        self.state = state;
        self.deadline = deadline;
    }

    fn on_frame(&mut self, frame: Frame) {
        let checked = match (frame, self.state) {
            (Frame::Setup { ram_pages, postcopy, machine }, State::Setup) => self.on_setup(ram_pages, postcopy, machine),
            (Frame::Zero(runs), State::Receiving | State::Running) => self.on_zero(&runs),
            (Frame::PassEnd(totals), State::Receiving) => self.check_totals(totals).map(|()| {
                self.actions.push_back(Action::FinishBuilding);
                self.send(Channel::Main, Frame::PassAck);
            }),
            (Frame::Switchover(package), State::Receiving) => self.on_switchover(package),
            (Frame::Commit, State::Ready) => {
                self.actions.push_back(Action::Run);
                self.enter(State::Starting, None);
                Ok(())
            }
            (Frame::Bitmap { index, first, zero, words }, State::Running) => self.on_bitmap(index, first, zero, words),
            (Frame::BitmapComplete(index), State::Running) => {
                self.bitmaps.complete(index).map(|()| self.actions.push_back(Action::CompleteBitmap(index)))
            }
            (Frame::End, State::Running) => {
                self.end_received = true;
                Ok(())
            }
            (Frame::Abort(reason), _) => return self.fail_silently(&reason),
            (frame, state) => Err(format!("the source sent {:?} in state {state:?}, which makes no sense", frame.kind())),
        };
        if let Err(reason) = checked {
            self.fail(&reason);
        }
    }

    fn on_setup(&mut self, ram_pages: u64, postcopy: bool, machine: Vec<u8>) -> Result<(), String> {
        if ram_pages == 0 || ram_pages > MAX_RAM_PAGES {
            return Err(format!("a guest of {ram_pages} pages of RAM cannot be received"));
        }
        self.ram_pages = ram_pages;
        self.actions.push_back(Action::Prepare { ram_pages, postcopy, machine });
        self.enter(State::Preparing, None);
        Ok(())
    }

    fn on_zero(&mut self, runs: &[PageRun]) -> Result<(), String> {
        for &run in runs {
            if !run.is_within(self.ram_pages) {
                return Err(format!("the source sent zero {run} of {}", self.ram_pages));
            }
            if self.state == State::Running {
                self.actions.push_back(Action::PlaceZero(run));
                continue;
            }
            self.received.zero += run.count;
            self.actions.extend(self.written.runs_within(run).map(Action::Empty));
            self.written.remove(run);
        }
        Ok(())
    }

    fn check_totals(&self, sent: Totals) -> Result<(), String> {
        let received = self.received;
        if sent == received {
            return Ok(());
        }
        Err(format!(
            "the source sent {} pages and {} zero pages, but {} and {} came",
            sent.normal, sent.zero, received.normal, received.zero
        ))
    }

    fn on_switchover(&mut self, package: Package) -> Result<(), String> {
        self.check_totals(package.sent)?;
        if !package.postcopy && !package.missing.is_empty() {
            return Err("pages are missing at the end of precopy".into());
        }
        let mut missing = PageSet::empty(self.ram_pages);
        for &run in &package.missing {
            if !run.is_within(self.ram_pages) || missing.insert(run) != run.count {
                return Err(format!("the list of missing pages is wrong at {run}"));
            }
        }
        self.postcopy = package.postcopy;
        self.incoming = Incoming::new(missing);
        self.bitmaps = IncomingBitmaps::new(&package.bitmaps);
        self.actions.push_back(Action::Load(Box::new(package)));
        self.enter(State::Loading, None);
        Ok(())
    }

    fn on_bitmap(&mut self, index: u32, first: u64, zero: u64, words: Vec<u64>) -> Result<(), String> {
        let count = if words.is_empty() { zero } else { words.len() as u64 };
        if count > MAX_BITMAP_WORDS {
            return Err(format!("{count} words of a bitmap came in one frame"));
        }
        self.bitmaps.words(index, first, count)?;
        self.actions.push_back(Action::LoadBitmap { index, first, count, words });
        Ok(())
    }

    /// Done only when the source says it is, nothing is missing and every zero page and bitmap in the queue has been dealt with.
    fn check_complete(&mut self) {
        let all_here = self.incoming.missing().is_empty() && self.bitmaps.all_complete() && self.actions.is_empty();
        if self.state == State::Running && self.end_received && all_here {
            if let Some(latencies) = &self.latencies {
                self.faults.p50_us = latencies.value_at_quantile(0.5);
                self.faults.p99_us = latencies.value_at_quantile(0.99);
                self.faults.max_us = latencies.max();
            }
            let warnings = std::mem::take(&mut self.warnings);
            self.send(Channel::Main, Frame::Done { faults: self.faults.clone(), warnings });
            self.finish(Outcome::Completed);
        }
    }

    fn fail(&mut self, reason: &str) {
        if !self.is_committed() {
            self.actions.clear();
            self.send(Channel::Main, Frame::Abort(reason.into()));
        }
        self.fail_silently(reason);
    }

    /// Ends the migration without telling the source. After the commit the guest goes on, with what is here.
    fn fail_silently(&mut self, reason: &str) {
        if !self.is_committed() {
            return self.finish(Outcome::Abandoned(reason.into()));
        }
        if !self.bitmaps.all_complete() {
            self.actions.push_back(Action::AbandonBitmaps);
        }
        // Zero pages that have come are placed before the end, all the same.
        let mut missing = self.incoming.missing().clone();
        for action in &self.actions {
            if let Action::PlaceZero(run) = action {
                missing.remove(*run);
            }
        }
        self.finish(if missing.is_empty() { Outcome::Completed } else { Outcome::Incomplete(reason.into()) });
    }

    fn finish(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome.clone());
        self.actions.push_back(Action::End(outcome));
        self.enter(State::Ended, None);
    }
}

#[cfg(test)]
mod tests;
