//! The source's host: does what the engine says, as the driver would.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use ferry::memory::PageRun;
use ferry::migrate::source::{self, Bulk, Config, Sent, Source, Stopped};
use ferry::migrate::wire::{BitmapInfo, Channel, Frame};

use super::{BITS, DISABLED, Right, World, brief, disabled_bits};
use crate::link::{CHANNELS, index};
use crate::memory::Ram;
use crate::plan::{Fault, Plan};

pub(super) struct SourceHost {
    pub(super) engine: Source,
    pub(super) ram: Ram,
    pub(super) right: Right,
    pub(super) alive: bool,
    pub(super) outcome: Option<source::Outcome>,
    pub(super) inputs: VecDeque<source::Input>,
    /// The guest is being stopped; it may write until it stands still.
    pub(super) stopping: bool,
}

impl SourceHost {
    /// A host that runs the guest in `ram` and begins to move it.
    pub(super) fn new(plan: &Plan, ram: Ram) -> Self {
        SourceHost {
            engine: engine(plan),
            ram,
            right: Right::Running,
            alive: true,
            outcome: None,
            inputs: VecDeque::new(),
            stopping: false,
        }
    }

    /// Begins to move the guest once more.
    pub(super) fn retry(&mut self, plan: &Plan) {
        self.engine = engine(plan);
        self.outcome = None;
        self.inputs.clear();
    }
}

fn engine(plan: &Plan) -> Source {
    let (mode, downtime_limit, ram_pages) = (plan.mode, plan.downtime_limit, plan.pages);
    Source::new(Config { mode, downtime_limit, ram_pages, session: 42, machine: vec![1, 2, 3] })
}

impl World {
    // --- the source's driver ---

    pub(super) fn source_step(&mut self) -> Result<(), String> {
        if !self.source.alive {
            return Ok(());
        }
        if let Some(input) = self.source.inputs.pop_front() {
            self.source.engine.handle(input, self.now);
        } else if self.source.stopping {
            self.source_stopped();
        } else {
            match self.source.engine.poll(self.now) {
                source::Poll::Act(action) => self.source_acts(action),
                source::Poll::Bulk(bulk) => self.source_sends(bulk)?,
                source::Poll::Wait(_) => {}
            }
        }
        Ok(())
    }

    fn source_acts(&mut self, action: source::Action) {
        self.say(format!("source: {}", brief(&action)));
        if action == source::Action::GiveUp && self.fails(Fault::GiveUpFails) {
            let reason = "a disk cannot be flushed".into();
            return self.source.engine.handle(source::Input::GiveUpFailed(reason), self.now);
        }
        let source = &mut self.source;
        match action {
            source::Action::Send(frame) => {
                source.engine.sent_frame(&frame, 16);
                self.link.to_destination[0].send(frame, Vec::new());
            }
            source::Action::OpenUrgent => self.link.to_destination[1].send(Source::hello(42, Channel::Urgent), Vec::new()),
            source::Action::StartTracking => {
                let touched = source.ram.start_log();
                source.inputs.push_back(source::Input::Harvested(touched));
            }
            source::Action::Harvest => source.inputs.push_back(source::Input::Harvested(source.ram.harvest())),
            source::Action::Stop => source.stopping = true,
            source::Action::Resume => {
                assert_eq!(source.right, Right::Paused, "resumed a guest that does not stand still here");
                source.right = Right::Running;
            }
            source::Action::GiveUp => {
                assert_eq!(source.right, Right::Paused);
                source.right = Right::GivenUp;
            }
            source::Action::End(outcome) => {
                source.outcome = Some(*outcome);
                for channel in CHANNELS {
                    let pipe = &mut self.link.to_destination[index(channel)];
                    pipe.cut(usize::MAX);
                }
            }
        }
    }

    fn source_stopped(&mut self) {
        self.source.stopping = false;
        if self.fails(Fault::StopFails) {
            self.source.right = Right::Paused;
            self.source.inputs.push_back(source::Input::StopFailed("the guest cannot be saved".into()));
            return;
        }
        self.source.right = Right::Paused;
        let info = |name: &str, enabled| BitmapInfo { disk: "root".into(), name: name.into(), granularity: 65536, bits: BITS, enabled };
        let bitmaps = vec![info("last-week", false), info("backup", true)];
        let dirty = self.source.ram.harvest();
        let stopped = Stopped { machine: vec![7; 100], dirty, bitmaps, stop_us: 1, device_state_us: 1, last_sync_us: 1 };
        self.source.inputs.push_back(source::Input::Stopped(stopped));
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
                let sent = self.send_pages(0, run);
                self.source.engine.sent(sent);
            }
            Bulk::Bitmap { index: bitmap, first, count } => {
                let bits = if bitmap == DISABLED { disabled_bits() } else { self.bits_at_stop() };
                let words: Vec<u64> = (first..first + count)
                    .map(|word| bits.range(word * 64..word * 64 + 64).fold(0, |bits, bit| bits | 1 << (bit % 64)))
                    .collect();
                let frame = if words.iter().all(|word| *word == 0) {
                    Frame::Bitmap { index: bitmap, first, zero: count, words: Vec::new() }
                } else {
                    Frame::Bitmap { index: bitmap, first, zero: 0, words }
                };
                self.source.engine.sent_bitmap(100);
                self.link.to_destination[0].send(frame, Vec::new());
            }
        }
        Ok(())
    }

    /// The source's bits do not change after the stop; what the successor has is newer.
    fn bits_at_stop(&self) -> BTreeSet<u64> {
        self.bits.difference(&self.destination.bitmap.successor).copied().collect()
    }

    fn send_pages(&mut self, channel: usize, run: PageRun) -> Sent {
        let mut sent = Sent { busy: Duration::from_micros(run.count * 2), ..Sent::default() };
        for page in run.pages() {
            let version = self.source.ram.read(page);
            let single = PageRun::single(page);
            if version == 0 && channel == 0 {
                self.link.to_destination[channel].send(Frame::Zero(vec![single]), Vec::new());
                sent.zero += 1;
                sent.bytes += 20;
            } else {
                self.link.to_destination[channel].pages(single, vec![version]);
                sent.normal += 1;
                sent.bytes += 4112;
            }
        }
        sent
    }

    pub(super) fn source_reads(&mut self, channel: Channel) {
        let pipe = &mut self.link.to_source[index(channel)];
        if !self.source.alive || !pipe.is_ready() {
            return;
        }
        match (pipe.receive(), channel) {
            (None, _) => {
                pipe.end_seen = true;
                self.source.inputs.push_back(source::Input::Lost(channel, "cut".into()));
            }
            (Some(message), Channel::Main) => self.source.inputs.push_back(source::Input::Frame(message.frame)),
            (Some(message), Channel::Urgent) => {
                let Frame::Request(run) = message.frame else { panic!("not a request: {:?}", message.frame) };
                if self.source.outcome.is_none() {
                    match self.source.engine.request(run) {
                        Ok(()) => {
                            let sent = self.send_pages(1, run);
                            self.source.engine.sent_urgent(sent);
                        }
                        Err(reason) => self.source.inputs.push_back(source::Input::Failed(reason)),
                    }
                }
            }
        }
    }
}
