//! What happens in a simulated world: its size, its guest and what disturbs it, all chosen by a seed.

use std::time::Duration;

use ferry::migrate::pages::CLEAR_CHUNK;
use ferry::migrate::report::Mode;

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
