//! Two hosts, a guest and whoever disturbs them, one small step at a time in an order that the seed chooses.

mod destination;
mod disturb;
mod freeze;
mod greet;
mod guest;
mod oracle;
mod person;
mod placement;
mod source;
mod source_links;

use std::collections::BTreeSet;
use std::time::Duration;

use destination::DestinationHost;
use ferry::memory::{PageNumber, PageRun};
use ferry::migrate::layout::Layout;
use freeze::{Freeze, Side};
pub use oracle::Ending;
use source::SourceHost;

use crate::link::Connection;
use crate::memory::{Ram, Version};
use crate::plan::{Choices, From, Plan};

/// What a host may do with the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Right {
    Running,
    Paused,
    GivenUp,
    /// The guest has ended there.
    Ended,
    /// Not the host's to run.
    None,
}

/// Index of the bitmap that records nothing.
const DISABLED: u32 = 0;
/// Bits in a bitmap.
const BITS: u64 = 66_000;
/// A migration of any seed that takes longer does not end.
const MAX_STEPS: u64 = 1_000_000;
/// After so many steps without anything under way time passes quickly.
const STILL_STEPS: u64 = 20_000;
/// Longer than any time limit of either engine.
const TOO_LONG: Duration = Duration::from_secs(61);

pub struct World {
    choices: Choices,
    now: Duration,
    step: u64,
    plan: Plan,
    /// The step from which the plan counts, once it has come.
    plan_begins: Option<u64>,
    /// All that there ever were; the hosts know theirs by the index.
    connections: Vec<Connection>,
    source: SourceHost,
    destination: DestinationHost,
    freeze: Option<Freeze>,
    /// What the guest has written, wherever it ran: the truth.
    truth: Vec<Version>,
    bits: BTreeSet<u64>,
    next_version: Version,
    /// The last step at which something was seen under way.
    moved_at: u64,
    story: Vec<String>,
}

impl World {
    pub fn new(seed: u64, plan: &Plan) -> Self {
        let mut choices = Choices::new(seed);
        let layout = plan.layout();
        let mut ram = Ram::new(layout.clone());
        let mut truth = vec![0; layout.pages() as usize];
        let mut next_version = 1;
        for page in all_pages(&layout) {
            if choices.chance(60) {
                // Some touched pages are zero.
                let version = if choices.chance(20) { 0 } else { next_version };
                ram.write(page, version);
                truth[page.0 as usize] = version;
                next_version += 1;
            }
        }
        let bits = (0..choices.below(50)).map(|_| choices.below(BITS)).collect();
        World {
            source: SourceHost::new(plan, ram),
            destination: DestinationHost::new(plan),
            plan: plan.clone(),
            plan_begins: if plan.from == From::Start { Some(0) } else { None },
            freeze: None,
            choices,
            now: Duration::ZERO,
            step: 0,
            connections: Vec::new(),
            truth,
            bits,
            next_version,
            moved_at: 0,
            story: Vec::new(),
        }
    }

    /// A second try to another destination, undisturbed.
    pub fn retry(&mut self) {
        self.say("retry");
        self.plan.faults.clear();
        self.plan.cancels = 0;
        self.plan.dry_run = false;
        self.freeze = None;
        self.connections.clear();
        self.source.retry(&self.plan);
        self.now = Duration::ZERO;
        self.destination = DestinationHost::new(&self.plan);
    }

    /// How often the two were joined again.
    pub fn recoveries(&self) -> u32 {
        self.source.outcome.as_ref().map_or(0, |outcome| outcome.report().recoveries)
    }

    /// Whether something like this is part of the story.
    pub fn had(&self, what: &str) -> bool {
        self.story.iter().any(|line| line.contains(what))
    }

    pub fn story(&self) -> String {
        self.story[self.story.len().saturating_sub(80)..].join("\n")
    }

    /// Runs until nothing moves any more, and judges.
    pub fn run(&mut self) -> Result<Ending, String> {
        for _ in 0..MAX_STEPS {
            self.step += 1;
            let passed = self.pass_time()?;
            self.now += passed;
            self.disturb();
            self.person_acts();
            self.time_may_pass();
            self.check_runners()?;
            if let Some(ending) = self.judge()? {
                return Ok(ending);
            }
            match self.choices.below(100) {
                dice if dice < self.guest_share() => self.guest_step()?,
                dice if self.is_frozen(if matches!(dice % 8, 0 | 1 | 6 | 7) { Side::Source } else { Side::Destination }) => {}
                dice if dice % 8 == 0 => self.source_reads_main(),
                dice if dice % 8 == 1 => self.source_serves_requests(),
                dice if dice % 8 == 2 => self.destination_session()?,
                dice if dice % 8 == 3 => self.destination_reads_pages(),
                dice if dice % 8 == 4 => self.destination_serves()?,
                dice if dice % 8 == 5 => self.destination_greets(),
                dice if dice % 8 == 6 => self.source_sends_pages(),
                _ => self.source_step()?,
            }
        }
        Err("it never ended".into())
    }

    /// In how many of a hundred steps the guest does something, where it is.
    fn guest_share(&self) -> u64 {
        let (side, throttle) = match self.source.right {
            Right::Running => (Side::Source, self.source.throttle),
            _ => (Side::Destination, 0),
        };
        if self.is_frozen(side) { 0 } else { self.plan.guest_share * u64::from(100 - throttle) / 100 }
    }

    /// Where nothing is on its way any more, whoever waits will wait until a time limit.
    fn time_may_pass(&mut self) {
        if !self.step.is_multiple_of(STILL_STEPS / 10) {
            return;
        }
        let moves =
            self.connections.iter().any(|connection| connection.to_destination.has_messages() || connection.to_source.has_messages())
                || self.source.pages.iter().any(|sender| !sender.batches.is_empty())
                || !self.destination.placing.is_empty();
        if moves {
            self.moved_at = self.step;
        } else if self.step - self.moved_at >= STILL_STEPS {
            self.moved_at = self.step;
            self.now += TOO_LONG;
        }
    }

    fn say(&mut self, text: impl Into<String>) {
        self.story.push(format!("{:>6} {}", self.step, text.into()));
    }
}

/// The pages of RAM, and the blocks of the disk.
fn all_pages(layout: &Layout) -> impl Iterator<Item = PageNumber> + use<> {
    let blocks = layout.disks().map(|(_, pages)| pages).collect::<Vec<_>>();
    layout.ram().pages().chain(blocks.into_iter().flat_map(PageRun::pages))
}

/// What the disabled bitmap holds.
fn disabled_bits() -> BTreeSet<u64> {
    [3, 9, BITS - 1].into()
}

fn brief(action: &impl std::fmt::Debug) -> String {
    let text = format!("{action:?}");
    text.chars().take(120).collect()
}
