//! The destination's host: does what the engine says, as the driver's threads would.

use std::collections::{BTreeSet, VecDeque};

use ferry::memory::{PageNumber, PageRun};
use ferry::migrate::destination::{self, Destination, Placement};
use ferry::migrate::pages::FaultAnswer;
use ferry::migrate::wire::{Channel, Frame};

use super::{DISABLED, Right, World, brief, disabled_bits};
use crate::link::{CHANNELS, index};
use crate::memory::{Ram, Version};
use crate::plan::Fault;

pub(super) struct DestinationHost {
    pub(super) engine: Destination,
    pub(super) ram: Ram,
    pub(super) right: Right,
    pub(super) alive: bool,
    pub(super) outcome: Option<destination::Outcome>,
    pub(super) userfault: bool,
    /// Faults that the kernel has queued, and answers under way.
    pub(super) faults: VecDeque<PageNumber>,
    pub(super) placing: Vec<(Channel, PageRun, Vec<Version>)>,
    pub(super) blocked: Option<PageNumber>,
    pub(super) bitmap: BitmapCopy,
}

/// The destination's bitmap: the source's bits, and the successor that records meanwhile.
#[derive(Default)]
pub(super) struct BitmapCopy {
    /// The bitmap that records nothing.
    pub(super) disabled: BTreeSet<u64>,
    pub(super) loaded: BTreeSet<u64>,
    pub(super) successor: BTreeSet<u64>,
    pub(super) complete: bool,
    pub(super) abandoned: bool,
}

impl DestinationHost {
    /// A host that waits for a guest.
    pub(super) fn new(pages: u64) -> Self {
        DestinationHost {
            engine: Destination::new(),
            ram: Ram::new(pages),
            right: Right::None,
            alive: true,
            outcome: None,
            userfault: false,
            faults: VecDeque::new(),
            placing: Vec::new(),
            blocked: None,
            bitmap: BitmapCopy::default(),
        }
    }
}

impl World {
    // --- the destination's driver ---

    pub(super) fn destination_reads(&mut self, channel: Channel) -> Result<(), String> {
        // A reader places what it has read before it reads again.
        if !self.destination.alive || self.destination.placing.iter().any(|(whose, ..)| *whose == channel) {
            return Ok(());
        }
        if channel == Channel::Main && self.destination_acts()? {
            return Ok(());
        }
        let pipe = &mut self.link.to_destination[index(channel)];
        if !pipe.is_ready() || self.destination.outcome.is_some() {
            return Ok(());
        }
        let engine = &mut self.destination.engine;
        let Some(message) = pipe.receive() else {
            pipe.end_seen = true;
            engine.handle(destination::Input::Lost(channel, "cut".into()));
            return Ok(());
        };
        match message.frame {
            Frame::Hello(hello) => engine.hello(&hello, self.now).map_err(|reason| format!("hello refused: {reason}"))?,
            Frame::Pages(run) => match engine.pages(channel, run) {
                Ok(Placement::Direct) => {
                    for (page, version) in run.pages().zip(message.contents) {
                        self.destination.ram.fill(page, version);
                    }
                }
                Ok(Placement::Fault) => self.destination.placing.push((channel, run, message.contents)),
                Err(reason) => engine.handle(destination::Input::Failed(reason)),
            },
            frame => engine.handle(destination::Input::Frame(channel, frame)),
        }
        Ok(())
    }

    /// Does what the engine says; true if there was anything.
    fn destination_acts(&mut self) -> Result<bool, String> {
        let destination::Poll::Act(action) = self.destination.engine.poll(self.now) else { return Ok(false) };
        self.say(format!("destination: {}", brief(&action)));
        match action {
            destination::Action::Send(channel, frame) => self.link.to_source[index(channel)].send(frame, Vec::new()),
            destination::Action::Prepare { .. } => {
                let input = if self.fails(Fault::PrepareFails) {
                    destination::Input::Failed("no such disk here".into())
                } else {
                    destination::Input::Prepared
                };
                self.destination.engine.handle(input);
            }
            destination::Action::FinishBuilding => {}
            destination::Action::Empty(run) => self.destination.ram.discard(run),
            destination::Action::Load(package) => {
                if self.fails(Fault::LoadFails) {
                    self.destination.engine.handle(destination::Input::Failed("the state does not load".into()));
                    return Ok(true);
                }
                for run in package.missing {
                    self.destination.ram.discard(run);
                }
                self.destination.userfault = package.postcopy;
                self.destination.right = Right::Paused;
                self.destination.engine.handle(destination::Input::Loaded { load_us: 5, warnings: Vec::new() });
            }
            destination::Action::Run => {
                self.destination.right = Right::Running;
                self.destination.engine.handle(destination::Input::Ran(5));
            }
            destination::Action::PlaceZero(run) => {
                for page in run.pages() {
                    self.place(page, 0);
                }
                self.destination.engine.placed(run, self.now);
            }
            destination::Action::LoadBitmap { index, first, words, .. } => {
                let bitmap = &mut self.destination.bitmap;
                let loaded = if index == DISABLED { &mut bitmap.disabled } else { &mut bitmap.loaded };
                for (word, bits) in (first..).zip(words) {
                    loaded.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| word * 64 + bit));
                }
            }
            destination::Action::CompleteBitmap(DISABLED) => {
                if self.destination.bitmap.disabled != disabled_bits() {
                    return Err("the disabled bitmap is wrong".into());
                }
            }
            destination::Action::CompleteBitmap(_) => {
                let bitmap = &mut self.destination.bitmap;
                bitmap.loaded.append(&mut bitmap.successor.clone());
                bitmap.complete = true;
            }
            destination::Action::AbandonBitmaps => self.destination.bitmap.abandoned = true,
            destination::Action::End(outcome) => {
                if matches!(outcome, destination::Outcome::Abandoned(_)) {
                    self.destination.right = Right::None;
                } else if outcome == destination::Outcome::Completed {
                    self.destination.userfault = false;
                }
                self.destination.outcome = Some(outcome);
                CHANNELS.iter().for_each(|channel| self.link.to_source[index(*channel)].cut(usize::MAX));
            }
        }
        Ok(true)
    }

    /// The fault server and the second half of placements, each one step of its own thread.
    pub(super) fn destination_serves(&mut self) -> Result<(), String> {
        if !self.destination.alive {
            return Ok(());
        }
        if self.choices.chance(50)
            && let Some(page) = self.destination.faults.pop_front()
        {
            match self.destination.engine.fault(page, self.now) {
                FaultAnswer::Request(run) => self.link.to_source[1].send(Frame::Request(run), Vec::new()),
                FaultAnswer::Wait => {}
                FaultAnswer::Zero(run) => run.pages().for_each(|page| self.place(page, 0)),
            }
            return Ok(());
        }
        if self.destination.placing.is_empty() {
            return Ok(());
        }
        let chosen = self.choices.below(self.destination.placing.len() as u64) as usize;
        let (channel, run, contents) = self.destination.placing[chosen].clone();
        // First the contents, then the account of it; other threads may run in between.
        if contents.is_empty() {
            self.destination.placing.remove(chosen);
            self.destination.engine.placed(run, self.now);
        } else {
            for (page, version) in run.pages().zip(contents) {
                self.place(page, version);
            }
            self.destination.placing[chosen] = (channel, run, Vec::new());
        }
        Ok(())
    }

    /// UFFDIO_COPY and UFFDIO_ZEROPAGE: a page that is there stays; whoever waits for it wakes.
    fn place(&mut self, page: PageNumber, version: Version) {
        if self.destination.userfault && !self.destination.ram.is_populated(page) {
            self.destination.ram.place(page, version);
        }
        if self.destination.blocked == Some(page) {
            self.destination.blocked = None;
        }
    }
}
