//! The source's side of a migration as a state machine without sockets and without a clock.
//!
//! The driver calls [`Source::poll`] in a loop and does what it says, and reports what happens with [`Source::handle`]. Time comes in
//! with every call, counted from the beginning of the migration.
//!
//! ```text
//!  Hello --Welcome--> Preparing --Prepared--> Precopy <--> PassAck? --decide--> Stopping --stopped--> LastPass
//!                                                ^                                  |  (postcopy: rest stays unsent)
//!                                                +------- too much was left --------+
//!  Stopping --stopped, where a person is to be waited for--> PreSwitchover --continue--> LastPass
//!  LastPass --all sent--> Switching --READY--> [GiveUp] COMMIT --> Committed --all sent--> Ending --Done--> Ended
//! ```
//!
//! After the commit a lost link ends nothing:
//!
//! ```text
//!  Committed, Ending --lost--> Paused --Recover, Hello--> Reconnecting --Welcome--> Comparing --Holding--> Committed
//!                                 ^                            |                        |
//!                                 +--------- lost again -------+------------------------+
//! ```
//!
//! The commit point is in `switchover`, `Source::on_ready`: [`Action::GiveUp`] comes before the `Commit` frame is sent. Up to there every failure ends
//! with the guest running here; from there on none does.

mod account;
mod action;
mod dry_run;
mod ending;
mod input;
mod passes;
mod pre_switchover;
mod recovery;
mod requested;
mod switchover;

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::time::Duration;

pub use account::Sent;
use dry_run::DryRun;

pub use action::{Action, Bulk, Outcome, Poll};
use ending::Failure;
pub use input::{Companions, Input, Stopped};
use requested::Requested;

use super::bitmaps::{BitmapStep, OutgoingBitmaps};
use super::layout::Layout;
use super::outgoing::Outgoing;
use super::policy::{Fixed, Throttling};
use super::report::{Mode, Report, Status};
use super::wire::{self, Channel, Frame, Hello, MAX_PAGE_CHANNELS, MAX_RUN, OLDEST_VERSION, Package, Setup, Totals, VERSION};
use crate::memory::{HostPage, PageRun, PageSet};

/// How long the destination may take to answer a `Hello`.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the destination may take to check its host and allocate RAM, or to place what it was sent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Time that the guest is given at the destination before what goes in the background takes the processors and the link: it asks for what
/// it needs to go on at all. In precopy it has everything as soon as it runs.
const CALM: Duration = Duration::from_millis(1);
/// From the commit on, if RUNNING does not come before, as over a long link: that one is not to lie idle.
const LONGEST_CALM: Duration = Duration::from_millis(2);
/// How long the guest stands still for a destination that does not become ready; then it goes on here.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the destination's last word is waited for once a connection is lost on which all was sent.
const ENDING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the destination may take to have all after END. What is still in the kernels' buffers, some megabytes at most, passes a link of
/// 100 kB/s meanwhile: whether it does cannot be seen from here. Before END a destination that reads nothing blocks the sends, which have
/// limits of their own.
const END_TIMEOUT: Duration = Duration::from_secs(120);
/// The same where disks are copied, which the destination flushes before it says that it has all.
const END_TIMEOUT_WITH_DISKS: Duration = Duration::from_secs(1800);
/// Where postcopy's background is limited, its runs are short: what goes at once is not spread, and stands in an urgent page's way on a link
/// of that width. But a host page goes whole.
const LIMITED_RUN: u64 = 64;
/// Passes that are reported; of more, the last ones.
const MAX_PASSES: usize = 100;

/// What a migration is to do; fixed when it begins, but for the limits.
#[derive(Clone, Debug)]
pub struct Config {
    /// How RAM moves.
    pub mode: Mode,
    /// Longest accepted blackout.
    pub downtime_limit: Duration,
    /// What is to move: RAM, and disks that are copied.
    pub layout: Layout,
    /// Connections for pages: 1 to [`MAX_PAGE_CHANNELS`].
    pub page_channels: u8,
    /// Random number of this migration.
    pub session: u128,
    /// The machine's configuration and needs, for the destination to check.
    pub machine: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Hello,
    Preparing,
    /// Waiting for the first set of pages, or the pages dirtied in the pass that was acknowledged.
    Harvesting,
    Sending,
    PassAck,
    /// In a dry run: until the next look at what the guest has dirtied.
    Watching,
    Stopping,
    /// The guest stands still, and a person is waited for.
    PreSwitchover,
    LastPass,
    Switching,
    Committed,
    Ending,
    /// The link was lost after the commit.
    Paused,
    Reconnecting,
    /// Waiting for what the destination has.
    Comparing,
    Ended,
}

/// The source's state machine.
#[derive(Clone, Debug)]
pub struct Source {
    config: Config,
    state: State,
    actions: VecDeque<Action>,
    deadline: Option<Duration>,
    outgoing: Outgoing,
    requested: Requested,
    /// Where RAM is mapped by transparent huge pages.
    huge: Vec<PageRun>,
    /// How many [`Bulk::Pages`] the driver has that it has not reported as sent. Nothing that counts on them may follow before.
    in_flight: u32,
    bitmaps: OutgoingBitmaps,
    /// Of the protocol, once it is settled.
    version: u16,
    package: Option<Stopped>,
    destination_built: bool,
    switch_postcopy: bool,
    postcopy_requested: bool,
    pause_before_switchover: bool,
    /// The right to run the guest is gone: [`Action::GiveUp`] was handed to the driver.
    given_up: bool,
    link: u32,
    package_sent: bool,
    /// What ends the migration as soon as the guest, about to be stopped, can be let go on.
    failure: Option<Failure>,
    pass: PassMeter,
    /// Until its forecasts are made.
    dry_run: Option<DryRun>,
    fixed: Fixed,
    switchover_bandwidth: Option<NonZeroU64>,
    postcopy_bandwidth: Option<NonZeroU64>,
    throttling: Option<Throttling>,
    /// Percentage of the time in which the guest's vCPUs stand still.
    throttle: u8,
    /// When the greeting went out, or a harvest was asked for: until the answer comes.
    asked_at: Duration,
    totals: Totals,
    stopped_at: Duration,
    sent_package_at: Duration,
    ready_at: Duration,
    /// After the commit: until then nothing goes but what the guest waits for.
    calm_until: Duration,
    setup_time: Duration,
    requests: u64,
    report: Report,
}

/// What is measured of the pass under way.
#[derive(Clone, Copy, Debug, Default)]
struct PassMeter {
    number: u32,
    began: Duration,
    sent: Sent,
    /// Of each connection for pages.
    busy: [Duration; MAX_PAGE_CHANNELS as usize],
}

impl Source {
    /// A migration that begins now, with a `Hello` to be sent on the main connection.
    pub fn new(config: Config) -> Self {
        let hello = Self::hello(config.session, 0, Channel::Main);
        let report = Report { mode: config.mode, ..Report::default() };
        Source {
            outgoing: Outgoing::new(config.layout.clone()),
            requested: Requested::default(),
            huge: Vec::new(),
            in_flight: 0,
            config,
            state: State::Hello,
            actions: VecDeque::from([Action::Connect, Action::Send(hello)]),
            deadline: Some(HELLO_TIMEOUT),
            bitmaps: OutgoingBitmaps::default(),
            version: OLDEST_VERSION,
            package: None,
            destination_built: false,
            switch_postcopy: false,
            postcopy_requested: false,
            pause_before_switchover: false,
            given_up: false,
            link: 0,
            package_sent: false,
            failure: None,
            pass: PassMeter::default(),
            dry_run: None,
            fixed: Fixed::default(),
            switchover_bandwidth: None,
            postcopy_bandwidth: None,
            throttling: None,
            throttle: 0,
            asked_at: Duration::ZERO,
            totals: Totals::default(),
            stopped_at: Duration::ZERO,
            sent_package_at: Duration::ZERO,
            ready_at: Duration::ZERO,
            calm_until: Duration::ZERO,
            setup_time: Duration::ZERO,
            requests: 0,
            report,
        }
    }

    /// The first frame on a connection of the migration `session`.
    pub fn hello(session: u128, link: u32, channel: Channel) -> Frame {
        Frame::Hello(Hello { channel, session, link, program: concat!("ferry ", env!("CARGO_PKG_VERSION")).into(), version: VERSION })
    }

    /// The number of the link that stands, stood last, or is being opened.
    pub fn link(&self) -> u32 {
        self.link
    }

    /// The pages that the destination does not hold in their last version.
    pub fn unsent(&self) -> &PageSet {
        self.outgoing.unsent()
    }

    /// Whether this only asks how a migration would go.
    pub fn is_dry_run(&self) -> bool {
        self.dry_run.is_some()
    }

    /// Whether the guest is the destination's, come what may.
    pub fn is_committed(&self) -> bool {
        self.given_up
    }

    /// Whether the migration has ended, or will with the next [`Action::End`].
    pub fn is_over(&self) -> bool {
        self.state == State::Ended
    }

    /// Which pages the guest is to bring along when it is stopped now.
    pub fn companions(&self) -> Companions {
        match (self.switch_postcopy, self.version) {
            (true, 4..) => Companions::Hot,
            (false, 5..) => Companions::Rest(self.unsent().clone()),
            _ => Companions::None,
        }
    }

    /// The longest accepted blackout.
    pub fn downtime_limit(&self) -> Duration {
        self.config.downtime_limit
    }

    /// Whether background pages may be slowed down to a bandwidth limit: never while the guest stands still, or a person waits for the
    /// switch.
    pub fn may_throttle(&self) -> bool {
        match self.state {
            State::Sending => !self.postcopy_requested,
            state => state == State::Committed,
        }
    }

    /// What to do next.
    pub fn poll(&mut self, now: Duration) -> Poll {
        if let Some(action) = self.actions.pop_front() {
            match action {
                Action::GiveUp => self.given_up = true,
                Action::Send(Frame::Hello(_)) | Action::Harvest => self.asked_at = now,
                Action::Send(Frame::Commit) => self.report.downtime.commit_us = (now - self.ready_at).as_micros() as u64,
                _ => {}
            }
            return Poll::Act(action);
        }
        let is_due = self.deadline.is_some_and(|deadline| now >= deadline);
        if is_due && self.state == State::Watching {
            self.actions.push_back(Action::Harvest);
            self.enter(State::Harvesting, None);
            return self.poll(now);
        }
        if is_due {
            let what = match self.state {
                State::Hello => "did not answer the greeting",
                State::Preparing => "did not get its machine ready",
                State::Switching => "did not load the guest's state",
                State::Reconnecting | State::Comparing => "did not say what it has",
                _ => "did not confirm what it was sent",
            };
            self.fail(Failure::Failed(format!("the destination {what} in time")), now);
            return self.poll(now);
        }
        if !matches!(self.state, State::Sending | State::LastPass | State::Committed) {
            return Poll::Wait(self.deadline);
        }
        if self.state == State::Committed && now < self.calm_until {
            return Poll::Wait(Some(self.calm_until));
        }
        let is_to_harvest = self.state == State::Sending && self.postcopy_requested;
        let is_enough = is_to_harvest || (self.state == State::Sending && self.has_probed(now));
        if !is_enough && let Some(poll) = self.next_to_send() {
            return poll;
        }
        if self.in_flight > 0 {
            return Poll::Wait(self.deadline);
        }
        if is_to_harvest {
            self.actions.push_back(Action::Harvest);
            self.enter(State::Harvesting, None);
        } else {
            self.all_sent(now);
        }
        self.poll(now)
    }

    /// Takes an input. What follows from it comes with the next [`Source::poll`].
    pub fn handle(&mut self, input: Input, now: Duration) {
        match (input, self.state) {
            (Input::ResumeFailed(reason), _) => self.on_resume_failed(&reason, now),
            (_, State::Ended) => {}
            // Of the link that is about to be closed; a person may already have asked for another one.
            (Input::Frame(_) | Input::Lost(..) | Input::Failed(_), _) if self.is_disconnecting() => {}
            (Input::Frame(frame), _) => self.on_frame(frame, now),
            (Input::Harvested(dirty), State::Harvesting) => self.on_harvested(&dirty, now),
            (Input::Stopped(stopped), State::Stopping) => self.on_stopped(*stopped, now),
            (Input::StopFailed(reason), State::Stopping) => {
                self.actions.push_back(Action::Resume);
                let failure = self.failure.take().unwrap_or(Failure::Failed(reason));
                self.fail_here(failure, now);
            }
            (Input::GiveUpFailed(reason), State::Committed) if self.actions.front() == Some(&Action::Send(Frame::Commit)) => {
                self.given_up = false;
                self.fail(Failure::Failed(reason), now);
            }
            (Input::Harvested(_) | Input::Stopped(_) | Input::StopFailed(_) | Input::GiveUpFailed(_), _) => {}
            (Input::GuestEnded(how), _) => self.fail(Failure::GuestEnded(how), now),
            (Input::Failed(reason), _) => self.fail(Failure::Failed(reason), now),
            // The destination may hold everything and have closed it, answers to late requests unread. Its last word on the other
            // connection, or that one's loss, decides.
            (Input::Lost(Channel::Urgent, _), State::Ending) => {}
            // The same, but what it carried may never have come: the destination does not know of a connection whose greeting was lost.
            (Input::Lost(Channel::Pages(_), _), State::Ending) => {
                self.deadline = Some(self.deadline.map_or(now + ENDING_TIMEOUT, |deadline| deadline.min(now + ENDING_TIMEOUT)));
            }
            (Input::Lost(_, reason), _) => {
                self.fail(Failure::Failed(format!("the connection to the destination was lost: {reason}")), now);
            }
            (Input::Recover, State::Paused) => {
                self.actions.push_back(Action::Connect);
                self.link += 1;
                self.send(Self::hello(self.config.session, self.link, Channel::Main));
                self.enter(State::Reconnecting, Some(now + HELLO_TIMEOUT));
            }
            (Input::Pause, _) if self.may_be_paused() => self.pause("it was broken on purpose"),
            (Input::Continue, State::PreSwitchover) => self.on_continue(now),
            (Input::Recover | Input::Pause | Input::Continue, _) => {}
            (Input::Cancel, _) if self.is_committed() => {}
            (Input::Cancel, _) => self.fail(Failure::Cancelled, now),
            (Input::StartPostcopy, _) => self.postcopy_requested = self.config.mode != Mode::Precopy && self.dry_run.is_none(),
            (Input::HugeRanges(ranges), _) => self.huge = ranges,
            (Input::PauseBeforeSwitchover(pause), _) => self.pause_before_switchover = pause,
            (Input::DowntimeLimit(limit), _) => self.config.downtime_limit = limit,
            (Input::SwitchoverBandwidth(bandwidth), _) => self.switchover_bandwidth = bandwidth,
            (Input::PostcopyBandwidth(limit), _) => self.postcopy_bandwidth = limit,
            (Input::Throttling(throttling), _) => {
                self.throttling = throttling;
                self.set_throttle(throttling.map_or(0, |throttling| self.throttle.min(throttling.max)));
            }
        }
    }

    fn send(&mut self, frame: Frame) {
        self.actions.push_back(Action::Send(frame));
    }

    fn enter(&mut self, state: State, deadline: Option<Duration>) {
        self.state = state;
        self.deadline = deadline;
    }

    fn on_frame(&mut self, frame: Frame, now: Duration) {
        match (frame, self.state) {
            (Frame::Welcome { version, program }, State::Hello | State::Reconnecting) if !(OLDEST_VERSION..=VERSION).contains(&version) => {
                let reason = format!("the destination ({program}) answers in version {version} of the protocol, which was not offered");
                self.fail(Failure::Failed(reason), now);
            }
            (Frame::Welcome { version, program }, State::Hello) => {
                if version < 3 && self.config.layout.has_disks() {
                    let reason = format!("the destination ({program}) does not know how to take disks; it needs a newer version of Ferry");
                    return self.fail(Failure::Failed(reason), now);
                }
                self.version = version;
                self.fixed.round_trip = now.saturating_sub(self.asked_at);
                self.actions.push_back(Action::OpenOthers);
                let machine = std::mem::take(&mut self.config.machine);
                let Config { layout, page_channels, mode, .. } = &self.config;
                let setup = Setup {
                    ram_pages: layout.ram().count,
                    host_page: layout.host_page(),
                    huge: std::mem::take(&mut self.huge),
                    postcopy: *mode != Mode::Precopy,
                    page_channels: *page_channels,
                    machine,
                    disks: layout.blocks_of_disks(),
                };
                self.send(Frame::Setup(setup));
                self.enter(State::Preparing, Some(now + ANSWER_TIMEOUT));
            }
            (Frame::Prepared, State::Preparing) => {
                self.setup_time = now;
                self.actions.push_back(Action::StartTracking);
                self.enter(State::Harvesting, None);
            }
            (Frame::PassAck, State::PassAck) if self.dry_run.is_some() => self.on_probe_arrived(now),
            (Frame::PassAck, State::PassAck) => {
                self.destination_built = true;
                self.actions.push_back(Action::Harvest);
                self.enter(State::Harvesting, None);
            }
            (Frame::Ready { load_us, warnings }, State::Switching) => self.on_ready(load_us, warnings, now),
            (Frame::Welcome { .. }, State::Reconnecting) => self.enter(State::Comparing, Some(now + ANSWER_TIMEOUT)),
            (Frame::Holding(holding), State::Comparing) => {
                if let Err(reason) = self.on_holding(&holding) {
                    self.fail(Failure::Failed(reason), now);
                }
            }
            // Said again after a recovery; the first one counts.
            (Frame::Running(_), State::Committed | State::Ending) if self.report.downtime.total_us > 0 => {}
            (Frame::Running(resume_us), State::Committed | State::Ending) => {
                let calm = if self.switch_postcopy { CALM } else { Duration::ZERO };
                self.calm_until = self.calm_until.min(now + calm);
                let downtime = &mut self.report.downtime;
                downtime.resume_us = resume_us;
                downtime.total_us = match self.link {
                    0 => (now - self.stopped_at).as_micros() as u64,
                    // The first one was lost, and the guest has run since.
                    _ => (self.ready_at - self.stopped_at).as_micros() as u64 + downtime.commit_us + resume_us,
                };
            }
            (Frame::Done { faults, warnings, block_waits }, State::Ending) => {
                self.report.warnings.extend(warnings);
                self.report.block_waits = block_waits.map(|waits| *waits);
                self.report.faults = self.switch_postcopy.then_some(*faults);
                self.send(Frame::Goodbye);
                self.finish(Status::Completed, now);
            }
            (Frame::Abort(reason), _) => self.fail(Failure::Failed(format!("the destination says: {reason}")), now),
            (frame, state) => {
                let kind = frame.kind();
                self.fail(Failure::Failed(format!("the destination sent {kind:?} in state {state:?}, which makes no sense")), now);
            }
        }
    }

    fn next_to_send(&mut self) -> Option<Poll> {
        let (max, clear, unit) = match self.state {
            State::Sending => (MAX_RUN, self.outgoing.take_chunk_to_clear(), HostPage::SMALL),
            State::LastPass if !self.switch_postcopy => (MAX_RUN, None, HostPage::SMALL),
            State::Committed => match self.bitmaps.next_step() {
                Some(BitmapStep::Words { index, first }) => {
                    return Some(Poll::Bulk(Bulk::Bitmap { index, first, limits: wire::run_limits(self.version) }));
                }
                // In its place between the words of two bitmaps, which is why it does not join the queue of actions.
                Some(BitmapStep::Complete(index)) => return Some(Poll::Act(Action::Send(Frame::BitmapComplete(index)))),
                None => {
                    let host_page = self.config.layout.host_page();
                    let max = if self.postcopy_bandwidth.is_some() { LIMITED_RUN.max(host_page.pages()) } else { MAX_RUN };
                    (max, None, host_page)
                }
            },
            _ => return None,
        };
        let runs = self.outgoing.take_next(max, self.config.page_channels)?;
        let channel = Channel::of(runs.first()?.first, self.config.page_channels);
        self.in_flight += 1;
        Some(Poll::Bulk(Bulk::Pages { channel, runs, clear, unit }))
    }

    fn all_sent(&mut self, now: Duration) {
        match self.state {
            State::Sending => {
                self.send(Frame::PassEnd(self.totals));
                self.enter(State::PassAck, Some(now + ANSWER_TIMEOUT));
            }
            State::LastPass => {
                let Some(mut stopped) = self.package.take() else {
                    return self.fail(Failure::Failed("the guest's state is missing".into()), now);
                };
                if self.version < 2 {
                    stopped.bitmaps.iter_mut().for_each(|bitmap| bitmap.flags.persistent = false);
                }
                self.package_sent = true;
                self.send(Frame::Switchover(Package {
                    sent: self.totals,
                    postcopy: self.switch_postcopy,
                    missing: self.unsent().runs().collect(),
                    bitmaps: stopped.bitmaps,
                    machine: stopped.machine,
                }));
                self.report.postcopy = self.switch_postcopy;
                self.enter(State::Switching, Some(now + SWITCH_TIMEOUT));
            }
            State::Committed => {
                self.send(Frame::End);
                let timeout = if self.config.layout.has_disks() { END_TIMEOUT_WITH_DISKS } else { END_TIMEOUT };
                self.enter(State::Ending, Some(now + timeout));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
