//! What happens in a simulated world: its size, its guest and what disturbs it, all chosen by a seed.

use std::time::Duration;

use ferry::memory::HostPage;
use ferry::migrate::layout::Layout;
use ferry::migrate::outgoing::CLEAR_CHUNK;
use ferry::migrate::policy::Throttling;
use ferry::migrate::report::Mode;
use ferry::migrate::wire::{Kind, MAX_RUN};

use crate::memory::HUGE;

/// A generator of choices: the same seed, the same story (splitmix64).
pub struct Choices(u64);

impl Choices {
    pub fn new(seed: u64) -> Self {
        Choices(seed)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    KillSource,
    KillDestination,
    CutMain,
    CutUrgent,
    /// One of the connections for pages.
    CutPages,
    CutAll,
    /// The connection is cut with the next frame of this kind on it.
    Lose(Kind),
    Cancel,
    StartPostcopy,
    PauseSource,
    PauseDestination,
    /// A person wants the guest no more at the destination.
    GiveUpDestination,
    PrepareFails,
    LoadFails,
    StopFails,
    GiveUpFails,
    /// The guest ends by itself, wherever the migration stands.
    GuestEnds,
    /// The guest that was stopped cannot go on at the source.
    ResumeFails,
    /// What was copied of a disk cannot be made durable.
    FlushFails,
    /// The process stands still for minutes; its kernel keeps the connections.
    FreezeSource,
    FreezeDestination,
    /// Longer than anybody waits for an answer.
    TimePasses,
    /// What no link may do: the oracle's own test.
    LoseFrame,
}

/// What ends or changes a migration.
const FAULTS: [Fault; 18] = [
    Fault::KillSource,
    Fault::KillDestination,
    Fault::CutMain,
    Fault::CutUrgent,
    Fault::CutPages,
    Fault::Cancel,
    Fault::StartPostcopy,
    Fault::GiveUpDestination,
    Fault::PrepareFails,
    Fault::LoadFails,
    Fault::StopFails,
    Fault::GiveUpFails,
    Fault::GuestEnds,
    Fault::ResumeFails,
    Fault::FlushFails,
    Fault::FreezeSource,
    Fault::FreezeDestination,
    Fault::TimePasses,
];

/// What a migration must survive once it is past READY.
const LOSSES: [Fault; 18] = [
    Fault::CutMain,
    Fault::CutUrgent,
    Fault::CutPages,
    Fault::CutAll,
    Fault::PauseSource,
    Fault::PauseDestination,
    Fault::GiveUpDestination,
    Fault::FreezeSource,
    Fault::FreezeDestination,
    Fault::Lose(Kind::Ready),
    Fault::Lose(Kind::Commit),
    Fault::Lose(Kind::Running),
    Fault::Lose(Kind::Welcome),
    Fault::Lose(Kind::Holding),
    Fault::Lose(Kind::BitmapComplete),
    Fault::Lose(Kind::End),
    Fault::Lose(Kind::Done),
    Fault::Lose(Kind::Goodbye),
];

/// From when on the steps of a plan's faults are counted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum From {
    Start,
    /// The guest stands still at the source, and a person is waited for.
    PreSwitchover,
    Ready,
}

/// What a seed is about.
#[derive(Clone)]
pub struct Plan {
    pub mode: Mode,
    pub pages: u64,
    /// Connections for them.
    pub page_channels: u8,
    /// Nothing is to be moved yet; a retry is the migration itself.
    pub dry_run: bool,
    /// What RAM is made of at both sides.
    pub host_page: HostPage,
    /// Huge pages come together at the destination before they are placed.
    pub staging: bool,
    /// Blocks of a disk that is copied.
    pub blocks: u64,
    /// Guest steps out of a hundred steps.
    pub guest_share: u64,
    pub downtime_limit: Duration,
    /// From which step on what happens as soon as it can.
    pub faults: Vec<(u64, Fault)>,
    pub from: From,
    /// A person is waited for before the switch.
    pub pause_before_switchover: bool,
    /// In how many of a hundred cases that person cancels.
    pub cancels: u64,
    /// The guest often writes much until it stands still.
    pub bursts: bool,
    pub throttling: Option<Throttling>,
    /// One chance in so many steps that a person does what is to be done; nobody is there where it is zero.
    pub patience: u64,
}

impl Plan {
    /// How pages are numbered.
    pub fn layout(&self) -> Layout {
        Layout::new(self.pages, self.host_page, &[0, self.blocks]).unwrap()
    }

    pub fn undisturbed(seed: u64) -> Self {
        let mut choices = Choices(seed ^ 0x5eed);
        let mut plan = Plan {
            mode: [Mode::Auto, Mode::Precopy, Mode::Postcopy][choices.below(3) as usize],
            pages: match choices.below(40) {
                // More than one chunk of pages whose dirty bits are cleared together.
                0 => CLEAR_CHUNK + choices.below(300),
                // More than travel on one connection.
                1..5 => MAX_RUN + choices.below(3 * MAX_RUN),
                _ => 1 + choices.below(400),
            },
            page_channels: 1 + choices.below(3) as u8,
            dry_run: false,
            host_page: HostPage::SMALL,
            staging: false,
            blocks: 0,
            guest_share: [1, 5, 20][choices.below(3) as usize],
            downtime_limit: Duration::from_millis([4, 10, 300][choices.below(3) as usize]),
            faults: Vec::new(),
            from: From::Start,
            pause_before_switchover: choices.chance(20),
            cancels: 0,
            bursts: choices.chance(30),
            throttling: None,
            patience: 0,
        };
        if choices.chance(30) {
            plan.host_page = HostPage::new(HUGE).unwrap();
            plan.pages = plan.pages.next_multiple_of(HUGE);
        } else if choices.chance(60) {
            plan.staging = true;
            plan.pages = plan.pages.next_multiple_of(HUGE);
        }
        if choices.chance(40) {
            // Sometimes more than travel together.
            plan.blocks = if choices.chance(10) { MAX_RUN + choices.below(MAX_RUN) } else { 1 + choices.below(100) };
        }
        if choices.chance(30) {
            plan.throttling = Some(Throttling { initial: 20, increment: 30, max: 99, tailslow: choices.chance(50) });
        }
        plan
    }

    /// One fault, and a person who does what can be done about it.
    pub fn disturbed(seed: u64) -> Self {
        let mut choices = Choices(seed ^ 0xd15);
        // Most faults come early; some long after the switch.
        let range = [60, 200, 800][choices.below(3) as usize];
        let mut faults = vec![(choices.below(range), FAULTS[choices.below(FAULTS.len() as u64) as usize])];
        if faults[0].1 == Fault::ResumeFails {
            // It is stopped, and then is not to be.
            faults.push((0, [Fault::StopFails, Fault::GiveUpFails, Fault::LoadFails][choices.below(3) as usize]));
        }
        Plan { faults, patience: 200, ..Self::undisturbed(seed) }
    }

    /// The link is lost, up to six times, while both sides live; mostly in and after the switch.
    pub fn losses(seed: u64) -> Self {
        let mut choices = Choices(seed ^ 0x1055);
        let from = if choices.chance(80) { From::Ready } else { From::Start };
        let range = [1, 30, 200, 2000][choices.below(4) as usize];
        let mut at = choices.below(range);
        let count = 1 + choices.below(6);
        let faults = (0..count).map(|_| {
            // Often in the middle of the recovery from the one before.
            let range = [20, 100, 600][choices.below(3) as usize];
            at += choices.below(range);
            (at, LOSSES[choices.below(LOSSES.len() as u64) as usize])
        });
        let faults = faults.collect();
        let patience = [1, 20, 400][choices.below(3) as usize];
        Plan { faults, from, patience, ..Self::undisturbed(seed) }
    }

    /// A person is waited for before the switch, and meanwhile, or soon after, up to two things go wrong.
    pub fn waiting(seed: u64) -> Self {
        let mut choices = Choices(seed ^ 0x3a17);
        let faults = (0..choices.below(3)).map(|_| {
            let faults: &[Fault] = if choices.chance(50) { &FAULTS } else { &LOSSES };
            // Also at the very moment.
            let range = [1, 30, 400][choices.below(3) as usize];
            (choices.below(range), faults[choices.below(faults.len() as u64) as usize])
        });
        let faults = faults.collect();
        Plan { faults, from: From::PreSwitchover, pause_before_switchover: true, cancels: 30, patience: 200, ..Self::undisturbed(seed) }
    }

    /// A dry run, every second time with a fault.
    pub fn dry_run(seed: u64) -> Self {
        let plan = if seed.is_multiple_of(2) { Self::undisturbed(seed) } else { Self::disturbed(seed) };
        Plan { dry_run: true, ..plan }
    }

    /// Losses, and then a side dies.
    pub fn deadly(seed: u64) -> Self {
        let mut plan = Self::losses(seed);
        let mut choices = Choices(seed ^ 0xdead);
        let last = plan.faults.last().map_or(0, |(at, _)| *at);
        let who = if choices.chance(70) { Fault::KillSource } else { Fault::KillDestination };
        plan.faults.push((last + choices.below(1000), who));
        plan
    }
}
