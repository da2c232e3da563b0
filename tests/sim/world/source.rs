//! The source's host: does what the engine says, as the driver would.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use ferry::memory::PageRun;
use ferry::migrate::source::{self, Bulk, Config, Sent, Source, Stopped};
use ferry::migrate::wire::{BitmapInfo, Frame};

use super::{BITS, DISABLED, Right, World, brief, disabled_bits};
use crate::memory::{Ram, Version};
use crate::plan::{Fault, Plan};

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
    /// The last words are on their way; until which step the destination's end is waited for.
    pub(super) ending: Option<(Box<source::Outcome>, u64)>,
}

impl SourceHost {
    /// A host that runs the guest in `ram` and begins to move it.
    pub(super) fn new(plan: &Plan, ram: Ram) -> Self {
        let (mode, downtime_limit, ram_pages) = (plan.mode, plan.downtime_limit, plan.pages);
        let mut engine = Source::new(Config { mode, downtime_limit, ram_pages, session: 42, machine: vec![1, 2, 3] });
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
            ending: None,
        }
    }

    /// Begins to move the guest once more.
    pub(super) fn retry(&mut self, plan: &Plan) {
        let ram = std::mem::replace(&mut self.ram, Ram::new(0));
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
        } else {
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
            source::Action::OpenUrgent => self.source_opens_urgent(),
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
            source::Action::Watch => panic!("a dry run was not asked for"),
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
        let info = |name: &str, enabled| BitmapInfo { disk: "root".into(), name: name.into(), granularity: 65536, bits: BITS, enabled };
        let bitmaps = vec![info("last-week", false), info("backup", true)];
        let dirty = self.source.ram.harvest();
        let stopped = Stopped { machine: vec![7; 100], dirty, bitmaps, stop_us: 1, device_state_us: 1, last_sync_us: 1 };
        self.source.engine.handle(source::Input::Stopped(stopped), self.now);
        Ok(())
    }

    fn source_sends(&mut self, bulk: Bulk) -> Result<(), String> {
        match bulk {
            Bulk::Pages { run, clear } => {
                if let Some(range) = clear {
                    let mut harvested = self.source.engine.unsent().clone();
                    harvested.insert(run);
                    self.source.ram.clear(&harvested, range);
                }
                // A write between clearing and reading is read now and logged again.
                if self.source.right == Right::Running && self.choices.chance(20) {
                    self.guest_step()?;
                }
                let sent = self.source_sends_pages(run);
                self.source.engine.sent(sent);
            }
            Bulk::Bitmap { index: bitmap, first, count } => {
                let bits = match (&self.source.left, bitmap) {
                    (_, DISABLED) => disabled_bits(),
                    (Some((_, bits)), _) => bits.clone(),
                    (None, _) => return Err("bits are sent of a guest that runs".into()),
                };
                let words: Vec<u64> = (first..first + count)
                    .map(|word| bits.range(word * 64..word * 64 + 64).fold(0, |bits, bit| bits | 1 << (bit % 64)))
                    .collect();
                let frame = if words.iter().all(|word| *word == 0) {
                    Frame::Bitmap { index: bitmap, first, zero: count, words: Vec::new() }
                } else {
                    Frame::Bitmap { index: bitmap, first, zero: 0, words }
                };
                self.source.engine.sent_bitmap(100);
                self.source_says(frame, Vec::new());
            }
        }
        Ok(())
    }

    fn source_sends_pages(&mut self, run: PageRun) -> Sent {
        let mut sent = Sent { busy: Duration::from_micros(run.count * 2), ..Sent::default() };
        for page in run.pages() {
            let version = self.source.ram.read(page);
            let single = PageRun::single(page);
            if version == 0 {
                self.source_says(Frame::Zero(vec![single]), Vec::new());
                sent.zero += 1;
                sent.bytes += 20;
            } else {
                self.source_says(Frame::Pages(single), vec![version]);
                sent.normal += 1;
                sent.bytes += 4112;
            }
        }
        sent
    }
}
