//! The destination's host: does what the engine says, as the migration's thread would.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ferry::block::dirty_bitmap::BitmapRun;
use ferry::memory::{HostPage, PageNumber, PageRun};
use ferry::migrate::destination::{self, Action, Destination, Input, Link};
use ferry::migrate::wire::{Channel, Kind, Package};

use super::placement::{Placing, Replacing};
use super::{DISABLED, Right, World, brief, disabled_bits};
use crate::machine;
use crate::memory::{HUGE, Ram, Version};
use crate::plan::{Fault, Plan};

pub(super) struct DestinationHost {
    pub(super) engine: Destination,
    pub(super) ram: Ram,
    pub(super) right: Right,
    pub(super) alive: bool,
    /// All of the guest is here.
    pub(super) whole: bool,
    pub(super) outcome: Option<destination::Outcome>,
    pub(super) userfault: bool,
    /// Faults that the kernel has queued, and answers under way.
    pub(super) faults: VecDeque<PageNumber>,
    pub(super) placing: Vec<Placing>,
    /// What has come of huge pages that are not in place, and those that are about to be.
    pub(super) staging: BTreeMap<PageNumber, Version>,
    pub(super) replacing: Vec<Replacing>,
    /// Blocks that the guest's device has begun to wait for.
    pub(super) wanted: VecDeque<PageRun>,
    pub(super) blocked: Option<PageNumber>,
    /// When a page was placed last, or the source came back.
    pub(super) heard_at: Duration,
    pub(super) bitmap: BitmapCopy,
    pub(super) session: Option<Session>,
    /// The link that stands, by who greets.
    pub(super) current: Option<Link>,
    /// Links whose readers are to end.
    pub(super) interrupted: BTreeSet<Link>,
    /// Connections on their way to those who use them.
    pub(super) next_main: Option<usize>,
    pub(super) next_urgent: Option<(Link, usize)>,
    /// Where faults are asked about.
    pub(super) urgent: Option<(Link, usize)>,
    /// Urgent connections and those for pages, each with a thread that reads it.
    pub(super) readers: Vec<(Link, usize)>,
}

/// The migration's thread.
pub(super) struct Session {
    pub(super) link: Link,
    /// Unless it is lost.
    pub(super) main: Option<usize>,
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
    pub(super) fn new(plan: &Plan) -> Self {
        DestinationHost {
            engine: Destination::new(),
            ram: Ram::new(plan.layout()),
            right: Right::None,
            alive: true,
            whole: false,
            outcome: None,
            userfault: false,
            faults: VecDeque::new(),
            wanted: VecDeque::new(),
            placing: Vec::new(),
            staging: BTreeMap::new(),
            replacing: Vec::new(),
            blocked: None,
            heard_at: Duration::ZERO,
            bitmap: BitmapCopy::default(),
            session: None,
            current: None,
            interrupted: BTreeSet::new(),
            next_main: None,
            next_urgent: None,
            urgent: None,
            readers: Vec::new(),
        }
    }

    pub(super) fn main(&self) -> Option<usize> {
        self.session.as_ref()?.main
    }
}

impl World {
    // --- the destination's driver ---

    /// Does one thing that the engine says, or else reads one frame.
    pub(super) fn destination_session(&mut self) -> Result<(), String> {
        let destination = &mut self.destination;
        let Some(Session { link, main }) = destination.session else { return Ok(()) };
        if !destination.alive || destination.outcome.is_some() {
            return Ok(());
        }
        if let destination::Poll::Act(action) = destination.engine.poll(self.now) {
            self.say(format!("destination: {}", brief(&action)));
            return self.destination_acts(action);
        }
        let Some(index) = main else { return Ok(()) };
        let pipe = &mut self.connections[index].to_destination;
        let interrupted = destination.interrupted.contains(&link) && !pipe.has_messages();
        if !interrupted && !pipe.is_ready(self.step) {
            return Ok(());
        }
        let message = if interrupted { None } else { pipe.receive() };
        let Some(message) = message else {
            destination.engine.handle(Input::Lost(link, Channel::Main, "cut".into()));
            return Ok(());
        };
        // The connection may be replaced while its reader reads.
        self.destination_greets();
        let destination = &mut self.destination;
        destination.engine.handle(Input::Frame(link, Channel::Main, message.frame));
        Ok(())
    }

    fn destination_acts(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Send(channel, frame) => {
                assert_eq!(channel, Channel::Main);
                if frame.kind() == Kind::Ready {
                    self.plan_begins.get_or_insert(self.step);
                }
                if let Some(main) = self.destination.main() {
                    self.may_lose(main, frame.kind());
                    self.connections[main].to_source.send(frame, Vec::new());
                }
            }
            Action::Prepare(_) => {
                let fails = self.fails(Fault::PrepareFails);
                self.destination.engine.handle(if fails { Input::Failed("no such disk here".into()) } else { Input::Prepared });
            }
            Action::BeginBuilding | Action::FinishBuilding => {}
            Action::Load(package) => self.load(*package),
            Action::FlushDisks => {
                let fails = self.fails(Fault::FlushFails);
                self.destination.engine.handle(if fails { Input::DisksNotFlushed("it is broken".into()) } else { Input::DisksFlushed });
            }
            Action::Run => {
                if self.source.right != Right::GivenUp {
                    return Err("the guest is to run though the source has not given it up".into());
                }
                self.destination.right = Right::Running;
                // A link may come back while the guest is started.
                self.destination_greets();
                self.destination.engine.handle(Input::Ran(5));
            }
            Action::LoadBitmap { index, first, run } => {
                let bitmap = &mut self.destination.bitmap;
                let loaded = if index == DISABLED { &mut bitmap.disabled } else { &mut bitmap.loaded };
                let words = match run {
                    BitmapRun::Zeroes(_) => Vec::new(),
                    BitmapRun::Ones(count) => vec![!0; count as usize],
                    BitmapRun::Words(words) => words,
                };
                for (word, bits) in (first..).zip(words) {
                    loaded.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| word * 64 + bit));
                }
            }
            Action::CompleteBitmap(DISABLED) => {
                if self.destination.bitmap.disabled != disabled_bits() {
                    return Err("the disabled bitmap is wrong".into());
                }
            }
            Action::CompleteBitmap(_) => {
                let bitmap = &mut self.destination.bitmap;
                assert!(!bitmap.complete, "a bitmap is completed twice");
                bitmap.loaded.append(&mut bitmap.successor.clone());
                bitmap.complete = true;
            }
            Action::AbandonBitmaps => self.destination.bitmap.abandoned = !self.destination.bitmap.complete,
            Action::Disconnect(_) => self.destination_disconnects(),
            Action::Reconnect(link) => {
                let destination = &mut self.destination;
                if destination.current == Some(link) {
                    destination.session = Some(Session { link, main: destination.next_main.take() });
                }
            }
            Action::Complete => self.end_watch()?,
            Action::End(outcome) => {
                if matches!(outcome, destination::Outcome::Abandoned(_)) {
                    assert_ne!(self.destination.right, Right::Running, "abandoned a guest that runs");
                    self.destination.right = Right::None;
                }
                self.destination.outcome = Some(outcome);
                if let Some(main) = self.destination.main() {
                    self.connections[main].to_source.close();
                }
                self.connections.iter_mut().filter(|connection| !connection.greeted).for_each(|connection| connection.to_source.close());
            }
        }
        Ok(())
    }

    fn load(&mut self, package: Package) {
        if self.fails(Fault::LoadFails) {
            return self.destination.engine.handle(Input::Failed("the state does not load".into()));
        }
        self.destination.ram.expect(&package.missing);
        self.destination.userfault = package.postcopy;
        if package.postcopy && self.plan.staging {
            // Not all of it was huge at the source.
            let huge = self.choices.below(self.plan.pages / HUGE + 1) * HUGE;
            let range = PageRun::new(self.plan.pages - huge, huge);
            self.destination.engine.stage(HostPage::new(HUGE).unwrap(), &[range]);
        }
        for (page, version) in machine::decode(&package.machine) {
            self.destination.ram.place(page, version);
            if package.postcopy {
                self.destination.engine.placed(PageRun::single(page), self.now);
            }
        }
        self.destination.right = Right::Paused;
        self.destination.engine.handle(Input::Loaded { load_us: 5, warnings: Vec::new() });
    }

    /// Closes the main connection, and lets the reader of the urgent one end.
    fn destination_disconnects(&mut self) {
        let Some(Session { link, main }) = &mut self.destination.session else { return };
        if let Some(index) = main.take() {
            let keep = [usize::MAX, 0, 2][self.choices.below(3) as usize];
            self.connections[index].to_source.cut(keep, self.step);
            self.connections[index].to_destination.cut(0, u64::MAX);
        }
        if self.destination.current == Some(*link) {
            self.destination.interrupted.insert(*link);
        }
    }
}
