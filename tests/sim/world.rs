//! Two hosts, a guest and whoever disturbs them, one small step at a time in an order that the seed chooses.

mod destination;
mod guest;
mod oracle;
mod source;

use std::collections::BTreeSet;
use std::time::Duration;

use destination::DestinationHost;
use ferry::memory::PageNumber;
use ferry::migrate::source::Input;
use ferry::migrate::wire::Channel;
pub use oracle::Ending;
use source::SourceHost;

use crate::link::{CHANNELS, Link, index};
use crate::memory::{Ram, Version};
use crate::plan::{Choices, Fault, Plan};

/// What a host may do with the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Right {
    Running,
    Paused,
    GivenUp,
    /// Not the host's to run.
    None,
}

/// Index of the bitmap that records nothing.
const DISABLED: u32 = 0;
/// Bits in a bitmap.
const BITS: u64 = 66_000;

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
        let mut choices = Choices::new(seed);
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
        World {
            source: SourceHost::new(plan, ram),
            destination: DestinationHost::new(plan.pages),
            plan: Plan { ..*plan },
            choices,
            now: Duration::ZERO,
            step: 0,
            link: Link::default(),
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
        self.link = Link::default();
        self.source.retry(&self.plan);
        self.destination = DestinationHost::new(self.plan.pages);
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
            Fault::Cancel => self.source.inputs.push_back(Input::Cancel),
            Fault::StartPostcopy => self.source.inputs.push_back(Input::StartPostcopy),
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
}

/// What the disabled bitmap holds.
fn disabled_bits() -> BTreeSet<u64> {
    [3, 9, BITS - 1].into()
}

fn brief(action: &impl std::fmt::Debug) -> String {
    let text = format!("{action:?}");
    text.chars().take(120).collect()
}
