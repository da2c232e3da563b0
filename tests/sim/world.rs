//! Two hosts, a guest and whoever disturbs them, one small step at a time in an order that the seed chooses.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use ferry::memory::{PageNumber, PageRun};
use ferry::migrate::destination::{self, Destination, Placement};
use ferry::migrate::pages::{CLEAR_CHUNK, FaultAnswer};
use ferry::migrate::report::Mode;
use ferry::migrate::source::{self, Bulk, Config, Sent, Source, Stopped};
use ferry::migrate::wire::{BitmapInfo, Channel, Frame};

use crate::link::{CHANNELS, Link, index};
use crate::memory::{Ram, Version};

/// A generator of choices: the same seed, the same story (splitmix64).
pub struct Choices(u64);

impl Choices {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    KillSource,
    KillDestination,
    CutMain,
    CutUrgent,
    Cancel,
    StartPostcopy,
    PrepareFails,
    LoadFails,
    StopFails,
    GiveUpFails,
    /// What no link may do: the oracle's own test.
    LoseFrame,
}

const FAULTS: [Fault; 10] = [
    Fault::KillSource,
    Fault::KillDestination,
    Fault::CutMain,
    Fault::CutUrgent,
    Fault::Cancel,
    Fault::StartPostcopy,
    Fault::PrepareFails,
    Fault::LoadFails,
    Fault::StopFails,
    Fault::GiveUpFails,
];

/// What a seed is about.
pub struct Plan {
    pub mode: Mode,
    pub pages: u64,
    /// Guest steps out of a hundred steps.
    pub guest_share: u64,
    pub downtime_limit: Duration,
    /// At which step what happens.
    pub fault: Option<(u64, Fault)>,
}

impl Plan {
    pub fn undisturbed(seed: u64) -> Self {
        let mut choices = Choices(seed ^ 0x5eed);
        Plan {
            mode: [Mode::Auto, Mode::Precopy, Mode::Postcopy][choices.below(3) as usize],
            // Now and then more than one chunk of pages whose dirty bits are cleared together.
            pages: if choices.below(40) == 0 { CLEAR_CHUNK + choices.below(300) } else { 1 + choices.below(400) },
            guest_share: [1, 5, 20][choices.below(3) as usize],
            downtime_limit: Duration::from_millis([4, 10, 300][choices.below(3) as usize]),
            fault: None,
        }
    }

    pub fn disturbed(seed: u64) -> Self {
        let mut choices = Choices(seed ^ 0xd15);
        // Most faults come early; some long after the switch.
        let range = [60, 200, 800][choices.below(3) as usize];
        let fault = Some((choices.below(range), FAULTS[choices.below(FAULTS.len() as u64) as usize]));
        Plan { fault, ..Self::undisturbed(seed) }
    }

    pub fn fault_kind(&self) -> Option<Fault> {
        self.fault.map(|(_, fault)| fault)
    }
}

/// How a world ended, as the oracle sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The destination runs all of the guest.
    Moved,
    /// The source runs all of the guest, and a retry may be made.
    Stayed,
    /// The source died with the guest before the commit.
    DiedWithSource,
    /// After the commit a side or the link was lost.
    LostAfterCommit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Right {
    Running,
    Paused,
    GivenUp,
    /// Not the host's to run.
    None,
}

struct SourceHost {
    engine: Source,
    ram: Ram,
    right: Right,
    alive: bool,
    outcome: Option<source::Outcome>,
    inputs: VecDeque<source::Input>,
    /// The guest is being stopped; it may write until it stands still.
    stopping: bool,
}

struct DestinationHost {
    engine: Destination,
    ram: Ram,
    right: Right,
    alive: bool,
    outcome: Option<destination::Outcome>,
    userfault: bool,
    /// Faults that the kernel has queued, and answers under way.
    faults: VecDeque<PageNumber>,
    placing: Vec<(Channel, PageRun, Vec<Version>)>,
    blocked: Option<PageNumber>,
    bitmap: BitmapCopy,
}

/// The destination's bitmap: the source's bits, and the successor that records meanwhile.
#[derive(Default)]
struct BitmapCopy {
    /// The bitmap that records nothing.
    disabled: BTreeSet<u64>,
    loaded: BTreeSet<u64>,
    successor: BTreeSet<u64>,
    complete: bool,
    abandoned: bool,
}

/// Index of the bitmap that records nothing.
const DISABLED: u32 = 0;
const BITS: u64 = 66_000;
/// After so many writes the guest at the source only reads: precopy alone need not converge before.
const CALM: Version = 3000;

pub struct World {
    choices: Choices,
    now: Duration,
    step: u64,
    plan: Plan,
    link: Link,
    source: SourceHost,
    destination: DestinationHost,
    /// What the guest has written, wherever it ran: the truth.
    truth: Vec<Version>,
    bits: BTreeSet<u64>,
    next_version: Version,
    story: Vec<String>,
}

impl World {
    pub fn new(seed: u64, plan: &Plan) -> Self {
        let mut choices = Choices(seed);
        let mut ram = Ram::new(plan.pages);
        let mut truth = vec![0; plan.pages as usize];
        let mut next_version = 1;
        for page in 0..plan.pages {
            if choices.chance(60) {
                // Some touched pages are zero.
                let version = if choices.chance(20) { 0 } else { next_version };
                ram.write(PageNumber(page), version);
                truth[page as usize] = version;
                next_version += 1;
            }
        }
        let bits = (0..choices.below(50)).map(|_| choices.below(BITS)).collect();
        let config = config(plan);
        World {
            source: SourceHost {
                engine: Source::new(config),
                ram,
                right: Right::Running,
                alive: true,
                outcome: None,
                inputs: VecDeque::new(),
                stopping: false,
            },
            destination: fresh_destination(plan.pages),
            plan: Plan { ..*plan },
            choices,
            now: Duration::ZERO,
            step: 0,
            link: connected(),
            truth,
            bits,
            next_version,
            story: Vec::new(),
        }
    }

    /// A second try to another destination, undisturbed.
    pub fn retry(&mut self) {
        self.say("retry");
        self.plan.fault = None;
        self.link = connected();
        self.source.engine = Source::new(config(&self.plan));
        self.source.outcome = None;
        self.source.inputs.clear();
        self.destination = fresh_destination(self.plan.pages);
    }

    pub fn story(&self) -> String {
        self.story[self.story.len().saturating_sub(60)..].join("\n")
    }

    /// Runs until nothing moves any more, and judges.
    pub fn run(&mut self) -> Result<Ending, String> {
        for _ in 0..1_000_000 {
            self.step += 1;
            self.now += Duration::from_micros(20);
            self.disturb();
            if self.source.right == Right::Running
                && self.destination.right == Right::Running
                && self.source.alive
                && self.destination.alive
            {
                return Err("two runners".into());
            }
            if let Some(ending) = self.judge()? {
                return Ok(ending);
            }
            match self.choices.below(100) {
                dice if dice < self.plan.guest_share => self.guest_step()?,
                dice if dice % 6 == 0 => self.source_reads(Channel::Main),
                dice if dice % 6 == 1 => self.source_reads(Channel::Urgent),
                dice if dice % 6 == 2 => self.destination_reads(Channel::Main)?,
                dice if dice % 6 == 3 => self.destination_reads(Channel::Urgent)?,
                dice if dice % 6 == 4 => self.destination_serves()?,
                _ => self.source_step()?,
            }
        }
        Err("it never ended".into())
    }

    fn say(&mut self, text: impl Into<String>) {
        self.story.push(format!("{:>6} {}", self.step, text.into()));
    }

    fn disturb(&mut self) {
        let Some((at, fault)) = self.plan.fault else { return };
        if self.step < at {
            return;
        }
        let keep = self.choices.below(4) as usize;
        match fault {
            Fault::KillSource => {
                self.source.alive = false;
                CHANNELS.iter().for_each(|channel| self.link.to_destination[index(*channel)].cut(keep));
            }
            Fault::KillDestination => {
                self.destination.alive = false;
                CHANNELS.iter().for_each(|channel| self.link.to_source[index(*channel)].cut(keep));
            }
            Fault::CutMain | Fault::CutUrgent => {
                let channel = usize::from(fault == Fault::CutUrgent);
                self.link.to_destination[channel].cut(keep);
                self.link.to_source[channel].cut(0);
            }
            Fault::Cancel => self.source.inputs.push_back(source::Input::Cancel),
            Fault::StartPostcopy => self.source.inputs.push_back(source::Input::StartPostcopy),
            // These wait for the moment at which they can happen.
            Fault::PrepareFails | Fault::LoadFails | Fault::StopFails | Fault::GiveUpFails => return,
            Fault::LoseFrame => {
                let lost = CHANNELS.iter().any(|channel| self.link.to_destination[index(*channel)].lose_one());
                if !lost {
                    return;
                }
            }
        }
        self.say(format!("{fault:?}"));
        self.plan.fault = None;
    }

    fn fails(&mut self, fault: Fault) -> bool {
        let now = self.plan.fault_kind() == Some(fault);
        if now {
            self.say(format!("{fault:?}"));
            self.plan.fault = None;
        }
        now
    }

    // --- the guest ---

    fn guest_step(&mut self) -> Result<(), String> {
        let page = if self.plan.pages > CLEAR_CHUNK + 4 && self.choices.chance(30) {
            // Where a run might cross the border between two chunks.
            PageNumber(CLEAR_CHUNK - 4 + self.choices.below(8))
        } else {
            PageNumber(self.choices.below(self.plan.pages))
        };
        if self.choices.chance(10) {
            let bit = self.choices.below(BITS);
            if self.source.alive && self.source.right == Right::Running {
                self.bits.insert(bit);
            } else if self.destination.alive && self.destination.right == Right::Running {
                self.bits.insert(bit);
                if self.destination.bitmap.complete {
                    self.destination.bitmap.loaded.insert(bit);
                } else {
                    self.destination.bitmap.successor.insert(bit);
                }
            }
        }
        if self.source.alive && self.source.right == Right::Running {
            self.check_read(page, self.source.ram.read(page), "source")?;
            if self.next_version > CALM {
                return Ok(());
            }
            let version = self.fresh_version();
            self.source.ram.write(page, version);
            self.truth[page.0 as usize] = version;
        } else if self.destination.alive && self.destination.right == Right::Running && self.destination.blocked.is_none() {
            if self.destination.userfault && !self.destination.ram.is_populated(page) {
                self.destination.faults.push_back(page);
                self.destination.blocked = Some(page);
                return Ok(());
            }
            self.check_read(page, self.destination.ram.read(page), "destination")?;
            let version = self.fresh_version();
            self.destination.ram.write(page, version);
            self.truth[page.0 as usize] = version;
        }
        Ok(())
    }

    fn fresh_version(&mut self) -> Version {
        self.next_version += 1;
        // A guest clears pages, too.
        if self.choices.chance(10) { 0 } else { self.next_version }
    }

    fn check_read(&self, page: PageNumber, found: Version, whose: &str) -> Result<(), String> {
        let wanted = self.truth[page.0 as usize];
        if found == wanted { Ok(()) } else { Err(format!("the guest at the {whose} read version {found} of {page} instead of {wanted}")) }
    }

    // --- the source's driver ---

    fn source_step(&mut self) -> Result<(), String> {
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

    fn source_reads(&mut self, channel: Channel) {
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

    // --- the destination's driver ---

    fn destination_reads(&mut self, channel: Channel) -> Result<(), String> {
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
    fn destination_serves(&mut self) -> Result<(), String> {
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

    // --- the oracle ---

    fn judge(&mut self) -> Result<Option<Ending>, String> {
        let quiet = CHANNELS.iter().all(|channel| self.link.to_destination[index(*channel)].is_empty());
        let (source, destination) = (&self.source, &self.destination);
        let source_ended = !source.alive || source.outcome.is_some();
        let destination_ended = !destination.alive || destination.outcome.is_some();
        if !(source_ended && destination_ended) || (destination.alive && !destination.placing.is_empty() && quiet) {
            // A source whose destination died before it connected hears of it from the link; give it its time.
            return Ok(None);
        }
        let completed = matches!(source.outcome, Some(source::Outcome::Completed(_)));
        if completed && destination.alive && destination.outcome != Some(destination::Outcome::Completed) {
            return Err("the source says it is done, and the destination does not".into());
        }
        if destination.alive && destination.outcome == Some(destination::Outcome::Completed) {
            for page in 0..self.plan.pages {
                self.check_read(PageNumber(page), destination.ram.read(PageNumber(page)), "destination, at the end,")?;
            }
            let bitmap = &destination.bitmap;
            if !bitmap.abandoned && bitmap.loaded != self.bits {
                return Err("the bitmap is wrong".into());
            }
            if completed && bitmap.abandoned {
                return Err("the bitmap was dropped though the source is done".into());
            }
            return Ok(Some(Ending::Moved));
        }
        match (source.alive, source.right) {
            (true, Right::Running) => {
                for page in 0..self.plan.pages {
                    self.check_read(PageNumber(page), source.ram.read(PageNumber(page)), "source, at the end,")?;
                }
                if destination.alive && destination.right == Right::Running {
                    return Err("two runners".into());
                }
                Ok(Some(Ending::Stayed))
            }
            (true, Right::Paused) => Err("the guest stands still at the source for ever".into()),
            (true, _) => Ok(Some(Ending::LostAfterCommit)),
            (false, Right::GivenUp) => Ok(Some(Ending::LostAfterCommit)),
            (false, _) if destination.alive && destination.right == Right::Running => Err("two runners".into()),
            (false, _) => Ok(Some(Ending::DiedWithSource)),
        }
    }
}

/// What the disabled bitmap holds.
fn disabled_bits() -> BTreeSet<u64> {
    [3, 9, BITS - 1].into()
}

fn config(plan: &Plan) -> Config {
    Config { mode: plan.mode, downtime_limit: plan.downtime_limit, ram_pages: plan.pages, session: 42, machine: vec![1, 2, 3] }
}

/// Both connections stand, and the urgent one has said what it is behind the main one.
fn connected() -> Link {
    Link::default()
}

fn fresh_destination(pages: u64) -> DestinationHost {
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

fn brief(action: &impl std::fmt::Debug) -> String {
    let text = format!("{action:?}");
    text.chars().take(120).collect()
}
