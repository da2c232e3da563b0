//! The destination's side of a migration as a state machine without sockets and without a clock.
//!
//! Several threads use it, one at a time. The reader of the main connection alone calls [`Destination::poll`] and does what it says, so
//! that things are done in order; the readers of the other connections and the server of page faults report to it and wake it. What the main
//! connection says about pages may come before the pages themselves have come on theirs, and then waits for them.
//!
//! ```text
//!  Hello --> Setup --Setup--> Preparing --prepared--> Receiving --Switchover--> Loading --loaded, READY--> Ready
//!  Ready --COMMIT--> Starting --vCPUs run, RUNNING--> Running --End, nothing missing, DONE--> Whole --Goodbye--> Ended
//! ```
//!
//! A GOODBYE in `Receiving`, instead of the switch, ends a dry run: the source only wanted to know how a migration would go.
//!
//! Before READY every failure ends with [`Outcome::Abandoned`]: nothing ran here, and nothing will. From READY on the source may have
//! given the guest up, so that only the source can say what is to become of it: a lost link is waited for ([`Destination::is_paused`]),
//! and whoever knows the session number may come back on a new one. After COMMIT the guest is ours, whatever happens.

mod action;
mod arrival;
mod ending;
mod faults;
mod input;
mod silence;

use std::collections::VecDeque;
use std::time::Duration;

pub use action::{Action, Outcome, Placement, Poll};
use arrival::Ahead;
pub use input::{Input, Link};

use super::bitmaps::IncomingBitmaps;
use super::blocktime::{Blocktime, Latencies};
use super::incoming::Incoming;
use super::layout::Layout;
use super::report::{Faults, Status};
use super::wire::{self, Channel, Frame, Hello, Holding, MAX_PAGE_CHANNELS, OLDEST_VERSION, Package, Setup, Totals, VERSION};
use crate::block::dirty_bitmap::BitmapRun;
use crate::memory::thp::MAX_RANGES;
use crate::memory::{HostPage, PageRun, PageSet};

/// How long the source may take from its `Hello` to its `Setup`.
const SETUP_TIMEOUT: Duration = Duration::from_secs(30);

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
    /// All is here. The source may not know it yet.
    Whole,
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durable {
    No,
    /// The driver is at it.
    Asked,
    /// It could not be done; the next link is another try.
    Failed,
    Yes,
}

/// The destination's state machine.
#[derive(Clone, Debug)]
pub struct Destination {
    state: State,
    actions: VecDeque<Action>,
    deadline: Option<Duration>,
    session: Option<u128>,
    link: Link,
    /// Why the link was lost, until there is another one.
    lost: Option<String>,
    /// Nobody waits for the source any more.
    alone: bool,
    urgent: bool,
    /// The connections for pages that stand, one bit each.
    page_channels: u16,
    /// Those that there are to be.
    wanted_page_channels: u16,
    prepared: bool,
    layout: Layout,
    /// Pages whose contents were written into RAM during precopy.
    written: PageSet,
    /// Pages that are in place.
    received: Totals,
    /// Frames with pages that readers have begun to put in place during precopy.
    receiving: u32,
    /// What the source has said on the main connection about pages of which some are still on their way on others.
    ahead: Option<Ahead>,
    incoming: Incoming,
    bitmaps: IncomingBitmaps,
    /// Of the protocol, once it is settled.
    version: u16,
    postcopy: bool,
    end_received: bool,
    /// Whether what was copied of disks would outlive a crash of this host.
    durable: Durable,
    /// When the source was last heard of: it came, was told READY, or sent pages.
    heard_at: Duration,
    resume_us: u64,
    warnings: Vec<String>,
    faults: Faults,
    blocktime: Blocktime,
    block_waits: Latencies,
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
            link: Link::default(),
            lost: None,
            alone: false,
            urgent: false,
            page_channels: 0,
            wanted_page_channels: 0,
            prepared: false,
            layout: Layout::default(),
            written: PageSet::empty(0),
            received: Totals::default(),
            receiving: 0,
            ahead: None,
            incoming: Incoming::new(PageSet::empty(0), Layout::default()),
            bitmaps: IncomingBitmaps::default(),
            version: OLDEST_VERSION,
            postcopy: false,
            end_received: false,
            durable: Durable::No,
            heard_at: Duration::ZERO,
            resume_us: 0,
            warnings: Vec::new(),
            faults: Faults::default(),
            blocktime: Blocktime::default(),
            block_waits: Latencies::default(),
            outcome: None,
        }
    }

    /// A connection says what it is; says to which link it belongs. An error refuses that connection, with words for its other end, and
    /// harms no migration under way.
    pub fn hello(&mut self, hello: &Hello, now: Duration) -> Result<Link, String> {
        match (hello.channel, self.session) {
            (Channel::Main, None) if self.state == State::Ended => Err("this side has given up waiting for a migration".into()),
            // A source that comes back to whoever waits here now, after the migration it means had ended, must not take their guest's place.
            (Channel::Main, None) if hello.link > 0 => Err("the migration that this connection belongs to is not here".into()),
            (Channel::Main, None) => {
                self.session = Some(hello.session);
                self.version = hello.version;
                self.welcome();
                self.enter(State::Setup, Some(now + SETUP_TIMEOUT));
                Ok(self.link)
            }
            (Channel::Main, Some(session)) if session == hello.session && hello.link > self.link.0 => {
                self.heard_at = now;
                self.come_back(Link(hello.link))
            }
            (Channel::Main, Some(session)) if session == hello.session => Err("a newer connection has replaced this one".into()),
            (Channel::Main, Some(_)) => Err("another migration to here is under way".into()),
            (Channel::Urgent, Some(session))
                if session == hello.session && self.link == Link(hello.link) && !self.urgent && self.lost.is_none() =>
            {
                self.urgent = true;
                self.check_prepared();
                Ok(self.link)
            }
            (Channel::Pages(index), Some(session))
                if session == hello.session
                    && self.link == Link(hello.link)
                    && index < MAX_PAGE_CHANNELS
                    && self.page_channels >> index & 1 == 0
                    && self.lost.is_none() =>
            {
                self.page_channels |= 1 << index;
                self.check_prepared();
                Ok(self.link)
            }
            (Channel::Urgent | Channel::Pages(_), _) => Err("this connection belongs to no migration to here".into()),
        }
    }

    /// The source is here on a new link, whether or not the loss of the old one was seen here.
    fn come_back(&mut self, link: Link) -> Result<Link, String> {
        if self.state == State::Ended {
            return Err("this migration is over at the destination".into());
        }
        if !matches!(self.state, State::Ready | State::Starting | State::Running | State::Whole) {
            self.fail("the source has lost the connection");
            return Err("the guest's state had not come when the link was lost".into());
        }
        self.pause("the source has come back on a new one");
        self.link = link;
        self.lost = None;
        if self.durable == Durable::Failed {
            self.durable = Durable::No;
        }
        self.actions.push_back(Action::Reconnect(self.link));
        self.welcome();
        self.send(
            Channel::Main,
            Frame::Holding(Holding {
                committed: self.is_committed(),
                missing: self.incoming.missing().runs().collect(),
                bitmaps: self.bitmaps.place(),
            }),
        );
        if matches!(self.state, State::Running | State::Whole) {
            self.send(Channel::Main, Frame::Running(self.resume_us));
        }
        Ok(self.link)
    }

    fn welcome(&mut self) {
        self.send(Channel::Main, Frame::Welcome { version: self.version, program: concat!("ferry ", env!("CARGO_PKG_VERSION")).into() });
    }

    /// Where the migration stands, in QEMU's words.
    pub fn status(&self) -> Status {
        match self.state {
            State::Hello => Status::None,
            State::Setup | State::Preparing => Status::Setup,
            State::Ready | State::Starting | State::Running if self.lost.is_some() => Status::PostcopyPaused,
            State::Receiving | State::Loading | State::Ready | State::Starting => Status::Active,
            State::Running => Status::PostcopyActive,
            State::Whole => Status::Completed,
            State::Ended if self.outcome == Some(Outcome::Completed) => Status::Completed,
            State::Ended => Status::Failed,
        }
    }

    /// Whether the guest is this side's.
    pub fn is_committed(&self) -> bool {
        matches!(self.state, State::Starting | State::Running | State::Whole) || self.outcome == Some(Outcome::Completed)
    }

    /// Whether the link is lost, and the source is waited for.
    pub fn is_paused(&self) -> bool {
        self.status() == Status::PostcopyPaused
    }

    /// Why, while it is.
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// What is to come, once the source has told it.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The link that stands or stood last.
    pub fn link(&self) -> Link {
        self.link
    }

    /// What to do next.
    pub fn poll(&mut self, now: Duration) -> Poll {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.fail("the source said nothing in time");
        }
        self.check_complete();
        if self.actions.is_empty() {
            self.check_silence(now);
        }
        let Some(action) = self.actions.pop_front() else { return Poll::Wait(self.next_look(now)) };
        if let Action::Send(_, Frame::Ready { .. }) = action {
            self.heard_at = now;
        }
        Poll::Act(action)
    }

    /// Whether pages that have come leave anything to do: the next [`Destination::poll`] need not wait. Most pages do not.
    pub fn has_news(&self) -> bool {
        !self.actions.is_empty() || (self.state == State::Running && self.incoming.is_whole())
    }

    /// Takes an input. What follows from it comes with the next [`Destination::poll`].
    pub fn handle(&mut self, input: Input) {
        match (input, self.state) {
            (_, State::Ended) => {}
            // Of a link that was lost before.
            (Input::Frame(link, ..) | Input::Nonsense(link, _) | Input::Lost(link, ..), _) if link != self.link || self.lost.is_some() => {}
            (Input::Frame(_, Channel::Main, frame), _) => self.on_frame(frame),
            (Input::Frame(_, channel, frame), _) => {
                self.fail(&format!("the source sent {:?} on the {channel:?} connection", frame.kind()));
            }
            (Input::Prepared, State::Preparing) => {
                self.prepared = true;
                // Only now: a size that this host has no RAM for must not cost anything.
                self.written = PageSet::empty(self.layout.pages());
                self.check_prepared();
            }
            (Input::Loaded { load_us, warnings }, State::Loading) => {
                self.send(Channel::Main, Frame::Ready { load_us, warnings });
                self.enter(State::Ready, None);
            }
            (Input::DisksFlushed, _) => self.durable = Durable::Yes,
            (Input::DisksNotFlushed(reason), _) => {
                self.durable = Durable::Failed;
                self.fail_here(&reason);
            }
            (Input::Ran(resume_us), State::Starting) => {
                self.resume_us = resume_us;
                if self.lost.is_none() {
                    self.send(Channel::Main, Frame::Running(resume_us));
                }
                self.enter(State::Running, None);
            }
            (Input::Prepared | Input::Loaded { .. } | Input::Ran(_), _) => {}
            (Input::Warning(warning), _) => self.warnings.push(warning),
            (Input::Failed(reason), _) => self.fail_here(&reason),
            (Input::Nonsense(_, reason), _) => self.fail(&reason),
            (Input::Lost(_, _, reason), _) => self.fail(&format!("the connection to the source was lost: {reason}")),
            // The source may have given the guest up just now: it says whether it has, or the link is lost and a person finds out.
            (Input::GiveUp(reason), State::Ready) if self.lost.is_none() => self.send(Channel::Main, Frame::Abort(reason)),
            (Input::GiveUp(reason), _) if !self.is_committed() => {
                self.actions.clear();
                self.send(Channel::Main, Frame::Abort(reason.clone()));
                self.finish(Outcome::Abandoned(reason));
            }
            (Input::Pause, State::Ready | State::Starting | State::Running) => self.pause("it was broken on purpose"),
            (Input::GiveUpRest, State::Running) if self.incoming.is_whole() => {
                if !std::mem::replace(&mut self.alone, true) {
                    self.bitmaps = IncomingBitmaps::default();
                    self.actions.push_back(Action::AbandonBitmaps);
                    self.pause("the rest was given up here");
                }
                // Another try.
                if self.durable == Durable::Failed {
                    self.durable = Durable::No;
                }
            }
            (Input::GiveUp(_) | Input::Pause | Input::GiveUpRest, _) => {}
        }
    }

    /// Pages may come when the host is ready and all connections stand: postcopy must not begin before it.
    fn check_prepared(&mut self) {
        let is_linked = self.urgent && self.page_channels == self.wanted_page_channels;
        if self.state == State::Preparing && self.prepared && is_linked {
            self.send(Channel::Main, Frame::Prepared);
            self.actions.push_back(Action::BeginBuilding);
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
            (Frame::Setup(setup), State::Setup) => self.on_setup(setup),
            (Frame::PassEnd(totals), State::Receiving) if self.ahead.is_none() => {
                self.ahead = Some(Ahead::PassEnd(totals));
                return self.check_ahead();
            }
            (Frame::Switchover(package), State::Receiving) if self.ahead.is_none() => {
                self.ahead = Some(Ahead::Switchover(package));
                return self.check_ahead();
            }
            (Frame::Commit, State::Ready) => {
                self.actions.push_back(Action::Run);
                self.enter(State::Starting, None);
                Ok(())
            }
            (Frame::Bitmap { index, first, run }, State::Running) => self.on_bitmap(index, first, run),
            (Frame::BitmapComplete(index), State::Running) => {
                self.bitmaps.complete(index).map(|()| self.actions.push_back(Action::CompleteBitmap(index)))
            }
            (Frame::End, State::Running) => {
                self.end_received = true;
                Ok(())
            }
            // The source did not hear the first one.
            (Frame::End, State::Whole) => {
                self.done();
                Ok(())
            }
            (Frame::Goodbye, State::Whole) => {
                self.finish(Outcome::Completed);
                Ok(())
            }
            // Nothing was meant to come.
            (Frame::Goodbye, State::Receiving) => return self.finish(Outcome::DryRun),
            // The source has not given the guest up.
            (Frame::Abort(reason), _) if !self.is_committed() => return self.finish(Outcome::Abandoned(reason)),
            (Frame::Abort(reason), _) => return self.pause(&reason),
            (frame, state) => Err(format!("the source sent {:?} in state {state:?}, which makes no sense", frame.kind())),
        };
        if let Err(reason) = checked {
            self.fail(&reason);
        }
    }

    fn on_setup(&mut self, setup: Setup) -> Result<(), String> {
        let Setup { ram_pages, host_page, page_channels, .. } = setup;
        let layout = Layout::new(ram_pages, host_page, &setup.disks)?;
        check_huge(&setup.huge, ram_pages)?;
        if !(1..=MAX_PAGE_CHANNELS).contains(&page_channels) {
            return Err(format!("pages cannot be received on {page_channels} connections, only on 1 to {MAX_PAGE_CHANNELS}"));
        }
        self.wanted_page_channels = !0 >> (16 - page_channels);
        self.layout = layout;
        self.actions.push_back(Action::Prepare(setup));
        self.enter(State::Preparing, None);
        Ok(())
    }

    fn on_switchover(&mut self, package: Package) -> Result<(), String> {
        if !package.postcopy && !package.missing.is_empty() {
            return Err("pages are missing at the end of precopy".into());
        }
        let mut missing = PageSet::empty(self.layout.pages());
        for &run in &package.missing {
            if !self.layout.holds(run) || !self.layout.divides(run) || missing.insert(run) != run.count {
                return Err(format!("the list of missing pages is wrong at {run}"));
            }
        }
        self.postcopy = package.postcopy;
        self.incoming = Incoming::new(missing, self.layout.clone());
        self.bitmaps = IncomingBitmaps::new(&package.bitmaps);
        self.actions.push_back(Action::Load(Box::new(package)));
        self.enter(State::Loading, None);
        Ok(())
    }

    fn on_bitmap(&mut self, index: u32, first: u64, run: BitmapRun) -> Result<(), String> {
        let limits = wire::run_limits(VERSION);
        let most = if let BitmapRun::Words(_) = run { limits.words } else { limits.ones };
        if run.count() > most {
            return Err(format!("{} words of a bitmap came in one frame", run.count()));
        }
        self.bitmaps.words(index, first, run.count())?;
        self.actions.push_back(Action::LoadBitmap { index, first, run });
        Ok(())
    }
}

/// Checks the ranges that were huge at the source.
fn check_huge(ranges: &[PageRun], ram_pages: u64) -> Result<(), String> {
    let mut end = 0;
    for range in ranges {
        if range.first.0 < end || !range.is_within(ram_pages) || !HostPage::HUGE.divides(*range) {
            return Err(format!("the list of huge pages is wrong at {range}"));
        }
        end = range.end();
    }
    if ranges.len() > MAX_RANGES { Err(format!("{} ranges of huge pages are too many", ranges.len())) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
