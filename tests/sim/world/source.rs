//! The source's host: does what the engine says, as the driver would.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use ferry::block::dirty_bitmap::BitmapRun;
use ferry::memory::{HostPage, PageNumber, PageRun, PageSet};
use ferry::migrate::layout::Layout;
use ferry::migrate::source::{self, Bulk, Config, Sent, Source, Stopped};
use ferry::migrate::wire::{BitmapFlags, BitmapInfo, Channel, Frame};

use super::{BITS, DISABLED, Right, World, brief, disabled_bits};
use crate::machine;
use crate::memory::{Ram, Version};
use crate::plan::{Fault, Plan};

/// Batches that wait for each connection for pages; the main thread waits where there are more.
const BATCHES: usize = 2;

pub(super) struct SourceHost {
    pub(super) engine: Source,
    pub(super) ram: Ram,
    pub(super) right: Right,
    pub(super) alive: bool,
    pub(super) outcome: Option<source::Outcome>,
    /// Percentage of the time in which the guest stands still.
    pub(super) throttle: u8,
    /// The guest ended by itself; its process may not have heard of it.
    pub(super) guest_ended: bool,
    /// The guest stays paused because it could not go on.
    pub(super) resume_failed: bool,
    /// When END was said, on the link that stands.
    pub(super) end_sent: Option<Duration>,
    /// What the readers have reported.
    pub(super) inputs: VecDeque<source::Input>,
    /// The guest is being stopped; it may write until it stands still.
    pub(super) stopping: bool,
    /// What the guest left behind when it stood still: pages and recorded bits.
    pub(super) left: Option<(Vec<Version>, BTreeSet<u64>)>,
    /// The main connection, where something can be sent on it.
    pub(super) main: Option<usize>,
    /// The main connection, as its reader has it until it has reported the end.
    pub(super) main_reader: Option<usize>,
    pub(super) urgent: Option<usize>,
    /// The connections for pages, each with what its thread is to send; by their numbers.
    pub(super) pages: Vec<PageSender>,
    /// The last words are on their way; until which step the destination's end is waited for.
    pub(super) ending: Option<(Box<source::Outcome>, u64)>,
}

/// A connection for pages and its thread.
pub(super) struct PageSender {
    pub(super) connection: usize,
    /// With how many pages go alike.
    pub(super) batches: VecDeque<(Vec<PageRun>, HostPage)>,
}

impl SourceHost {
    /// A host that runs the guest in `ram` and begins to move it.
    pub(super) fn new(plan: &Plan, ram: Ram) -> Self {
        let Plan { mode, downtime_limit, page_channels, .. } = *plan;
        let config = Config { mode, downtime_limit, layout: plan.layout(), page_channels, session: 42, machine: vec![1, 2, 3] };
        let mut engine = if plan.dry_run { Source::dry_run(config) } else { Source::new(config) };
        engine.handle(source::Input::PauseBeforeSwitchover(plan.pause_before_switchover), Duration::ZERO);
        engine.handle(source::Input::Throttling(plan.throttling), Duration::ZERO);
        SourceHost {
            engine,
            ram,
            right: Right::Running,
            alive: true,
            outcome: None,
            throttle: 0,
            guest_ended: false,
            resume_failed: false,
            end_sent: None,
            inputs: VecDeque::new(),
            stopping: false,
            left: None,
            main: None,
            main_reader: None,
            urgent: None,
            pages: Vec::new(),
            ending: None,
        }
    }

    /// Begins to move the guest once more.
    pub(super) fn retry(&mut self, plan: &Plan) {
        let ram = std::mem::replace(&mut self.ram, Ram::new(Layout::default()));
        *self = SourceHost::new(plan, ram);
    }
}

impl World {
    // --- the source's driver ---

    pub(super) fn source_step(&mut self) -> Result<(), String> {
        if !self.source.alive || self.source.outcome.is_some() {
            return Ok(());
        }
        if self.source.ending.is_some() {
            self.source_ends();
        } else if let Some(input) = self.source.inputs.pop_front() {
            self.source.engine.handle(input, self.now);
        } else if self.source.stopping {
            self.source_stopped()?;
        } else if self.source.pages.iter().all(|sender| sender.batches.len() < BATCHES) || self.source.engine.is_over() {
            match self.source.engine.poll(self.now) {
                source::Poll::Act(action) => self.source_acts(action)?,
                source::Poll::Bulk(bulk) => self.source_sends(bulk)?,
                source::Poll::Wait(_) => {}
            }
        }
        Ok(())
    }

    fn source_acts(&mut self, action: source::Action) -> Result<(), String> {
        self.say(format!("source: {}", brief(&action)));
        match action {
            source::Action::Connect => self.source_opens_main(),
            source::Action::Send(frame) => {
                self.source.engine.sent_frame(&frame, 16);
                if frame == Frame::End {
                    self.source.end_sent = Some(self.now);
                }
                self.source_says(frame, Vec::new());
            }
            source::Action::Disconnect(_) => {
                self.source.end_sent = None;
                self.source_disconnects();
            }
            source::Action::OpenOthers => self.source_opens_others(),
            source::Action::StartTracking => {
                let touched = self.source.ram.start_log();
                self.source.engine.handle(source::Input::Harvested(touched), self.now);
            }
            source::Action::Harvest => {
                let dirty = self.source.ram.harvest();
                self.source.engine.handle(source::Input::Harvested(dirty), self.now);
            }
            source::Action::Stop => self.source.stopping = true,
            source::Action::Resume => {
                assert_eq!(self.source.right, Right::Paused, "resumed a guest that does not stand still here");
                if self.source.guest_ended {
                    self.source.right = Right::Ended;
                } else if self.fails(Fault::ResumeFails) {
                    self.source.resume_failed = true;
                    self.source.engine.handle(source::Input::ResumeFailed("no vCPU runs".into()), self.now);
                } else {
                    self.source.right = Right::Running;
                }
            }
            source::Action::GiveUp => self.source_gives_up(),
            source::Action::Throttle(percent) => self.source.throttle = percent,
            source::Action::Watch => {
                assert!(self.plan.dry_run, "a dry run was not asked for");
                let dirty = self.source.ram.harvest();
                let all = PageRun::new(0, self.plan.pages);
                self.source.ram.clear(&PageSet::full(self.plan.pages), all);
                self.source.engine.handle(source::Input::Harvested(dirty), self.now);
            }
            source::Action::End(outcome) => {
                if matches!(*outcome, source::Outcome::Completed(_)) {
                    self.check_whole("destination, when the source is done,")?;
                }
                self.source_begins_to_end(outcome);
            }
        }
        Ok(())
    }

    /// Whatever has come after READY is a reason not to pass the commit point.
    fn source_gives_up(&mut self) {
        assert_eq!(self.source.right, Right::Paused);
        if self.fails(Fault::GiveUpFails) {
            let reason = "a disk cannot be flushed".into();
            self.source.engine.handle(source::Input::GiveUpFailed(reason), self.now);
        } else if let Some(hindrance) = self.source.inputs.pop_front() {
            self.source.engine.handle(source::Input::GiveUpFailed(format!("{hindrance:?}")), self.now);
        } else {
            self.source.right = Right::GivenUp;
            assert_eq!(self.source.throttle, 0, "a guest is given up that is slowed down");
        }
    }

    fn source_stopped(&mut self) -> Result<(), String> {
        if self.plan.bursts && self.source.right == Right::Running {
            for _ in 0..self.choices.below(200) {
                self.guest_step()?;
            }
        }
        self.source.stopping = false;
        self.source.right = Right::Paused;
        if self.source.guest_ended {
            self.source.engine.handle(source::Input::GuestEnded("it powered off".into()), self.now);
            self.source.engine.handle(source::Input::StopFailed("it has ended".into()), self.now);
            return Ok(());
        }
        if self.fails(Fault::StopFails) {
            self.source.engine.handle(source::Input::StopFailed("the guest cannot be saved".into()), self.now);
            return Ok(());
        }
        self.source.left = Some((self.truth.clone(), self.bits.clone()));
        let info = |name: &str, enabled| BitmapInfo {
            disk: "root".into(),
            name: name.into(),
            granularity: 65536,
            bits: BITS,
            flags: BitmapFlags { enabled, persistent: false },
        };
        let bitmaps = vec![info("last-week", false), info("backup", true)];
        let dirty = self.source.ram.harvest();
        let rest = self.rest(&dirty);
        let machine = machine::encode(rest.iter().map(|page| (*page, self.source.ram.read(*page))));
        let stopped = Stopped { machine, rest, dirty, bitmaps, stop_us: 1, device_state_us: 1, last_sync_us: 1 };
        self.source.engine.handle(source::Input::Stopped(Box::new(stopped)), self.now);
        Ok(())
    }

    /// What the guest brings along of what is left, which is all or nothing.
    fn rest(&mut self, dirty: &PageSet) -> Vec<PageNumber> {
        let source::Companions::Rest(mut rest) = self.source.engine.companions() else { return Vec::new() };
        rest.union(dirty);
        let ram = rest.runs_within(self.plan.layout().ram()).flat_map(PageRun::pages).collect::<Vec<_>>();
        if ram.len() as u64 == rest.len() && rest.len() <= self.choices.below(65) { ram } else { Vec::new() }
    }

    fn source_sends(&mut self, bulk: Bulk) -> Result<(), String> {
        match bulk {
            Bulk::Pages { channel, runs, clear, unit } => {
                if let Some(range) = clear {
                    let mut harvested = self.source.engine.unsent().clone();
                    runs.iter().for_each(|run| {
                        harvested.insert(*run);
                    });
                    self.source.ram.clear(&harvested, range);
                }
                let Channel::Pages(index) = channel else { return Err(format!("pages are to go on {channel:?}")) };
                // A write between clearing and reading is read then and logged again.
                if let Some(sender) = self.source.pages.get_mut(usize::from(index)) {
                    sender.batches.push_back((runs, unit));
                }
            }
            Bulk::Bitmap { index: bitmap, first, limits } => {
                let bits = match (&self.source.left, bitmap) {
                    (_, DISABLED) => disabled_bits(),
                    (Some((_, bits)), _) => bits.clone(),
                    (None, _) => return Err("bits are sent of a guest that runs".into()),
                };
                let word = |word| bits.range(word * 64..word * 64 + 64).fold(0, |bits, bit| bits | 1 << (bit % 64));
                let run = BitmapRun::first_of(first..BITS.div_ceil(64), limits, word);
                self.source.engine.sent_bitmap(run.count(), 100);
                self.source_says(Frame::Bitmap { index: bitmap, first, run }, Vec::new());
            }
        }
        Ok(())
    }

    /// The thread of one of the connections for pages sends a batch.
    pub(super) fn source_sends_pages(&mut self) {
        let waiting: Vec<usize> = (0..self.source.pages.len()).filter(|index| !self.source.pages[*index].batches.is_empty()).collect();
        if !self.source.alive || waiting.is_empty() {
            return;
        }
        let index = waiting[self.choices.below(waiting.len() as u64) as usize];
        let PageSender { connection, batches } = &mut self.source.pages[index];
        let (connection, Some((runs, unit))) = (*connection, batches.pop_front()) else { return };
        let channel = Channel::Pages(index as u8);
        if self.source.engine.is_over() {
            return;
        }
        let pipe = &mut self.connections[connection].to_destination;
        if pipe.is_broken(self.step) {
            batches.clear();
            return self.source.inputs.push_back(source::Input::Lost(channel, "broken".into()));
        }
        let mut sent = Sent::default();
        let is_ram = self.plan.layout().is_ram(runs[0].first);
        let unit = if is_ram { unit } else { HostPage::SMALL };
        let firsts = runs.iter().flat_map(|run| (run.first.0..run.end()).step_by(unit.pages() as usize));
        for run in firsts.map(|first| PageRun { first: PageNumber(first), count: unit.pages() }) {
            sent.busy += Duration::from_micros(2 * run.count);
            let contents: Vec<Version> = run.pages().map(|page| self.source.ram.read(page)).collect();
            if contents.iter().all(|version| *version == 0) {
                pipe.send(Frame::Zero(vec![run]), Vec::new());
                sent.zero += run.count;
                sent.bytes += 20;
            } else {
                pipe.send(Frame::Pages(run), contents);
                sent.normal += run.count;
                sent.bytes += 16 + run.bytes();
            }
        }
        self.source.engine.sent(channel, sent);
    }
}
