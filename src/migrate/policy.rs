//! When to go on with precopy, when to switch, and how: a pure function of what was measured, with its reason in words.
//!
//! Each pass leaves some share of what it was to send, because the guest dirties memory meanwhile. The next pass is expected to leave the
//! share that the last few passes left, the middle one of them, so that one burst decides nothing. A guest that swings between more and
//! less is caught by what it never gets below.

use std::time::Duration;

use super::report::{Mode, Pass};
use crate::memory::PAGE_SIZE;

/// Used until a pass has sent enough to measure: a slow gigabit link, in bytes a second.
const ASSUMED_BANDWIDTH: f64 = 100e6;
/// Stopping and saving the guest, until an attempt to switch has measured it.
const ASSUMED_STOP: Duration = Duration::from_millis(2);
/// The destination loading the guest's state.
const ASSUMED_LOAD: Duration = Duration::from_millis(1);
/// Pages that go in less time than the fixed part of the blackout takes.
const LITTLE: u64 = 64;
/// Another pass pays when it leaves less than this part of what the last one left.
const WORTHWHILE: f64 = 0.7;
/// Where the blackout is within its limit already, another pass pays when it leaves less than this part: it takes about as long as the
/// blackout becomes shorter.
const BETTER_STILL: f64 = 0.5;
/// Passes that are looked at together: what they leave in the middle is what the next one is expected to leave, and one of them must leave
/// worthwhile less than all before did.
const TOGETHER: usize = 3;

/// What is asked of a migration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// How RAM is to move.
    pub mode: Mode,
    /// Longest blackout the person accepts.
    pub downtime_limit: Duration,
    /// Bytes a second to count on in the switch, if a person knows better than the measurement.
    pub switchover_bandwidth: Option<f64>,
    /// Whether a person asked for postcopy now.
    pub postcopy_requested: bool,
    /// How far the guest may be slowed down where precopy does not end otherwise.
    pub throttling: Option<Throttling>,
}

/// How a guest is slowed down: percentages of the time in which its vCPUs stand still, from 1 to 99.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttling {
    /// At first.
    pub initial: u8,
    /// More, each time that this was not enough.
    pub increment: u8,
    /// At most.
    pub max: u8,
    /// Whether less is added where less is expected to suffice.
    pub tailslow: bool,
}

impl Throttling {
    /// The percentage after `throttle`, at which a pass leaves this share of what it was to send: the guest dirties in proportion to the
    /// time that it gets.
    fn next(&self, throttle: u8, share: f64) -> u8 {
        if throttle == 0 {
            return self.initial.min(self.max);
        }
        let runs = f64::from(100 - throttle.min(100));
        let needed = (runs - runs * WORTHWHILE / share.max(WORTHWHILE)).ceil() as u8;
        let increment = if self.tailslow { needed.clamp(1, self.increment.max(1)) } else { self.increment };
        throttle.saturating_add(increment).min(self.max)
    }
}

/// What was measured so far.
#[derive(Clone, Copy, Debug)]
pub struct History<'a> {
    /// The passes, or the last of them, as the report has them.
    pub passes: &'a [Pass],
    /// What the blackout costs beside pages.
    pub fixed: Fixed,
}

/// The part of the blackout that does not depend on RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fixed {
    /// Stopping the guest and saving its state, if that was done before: an attempt to switch that was given up.
    pub stop: Option<Duration>,
    /// The last harvest of dirty pages.
    pub harvest: Duration,
    /// A question to the destination and its answer. The switch takes two: READY for the package, RUNNING for the commit.
    pub round_trip: Duration,
    /// Size of the guest's state, in bytes; 0 before it was saved.
    pub state_bytes: u64,
}

/// What to do after a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send what was dirtied and look again.
    AnotherPass,
    /// The same, with the guest's vCPUs standing still for this percentage of the time.
    Throttle(u8),
    /// Stop the guest, send the rest, hand over.
    SwitchPrecopy,
    /// Stop the guest, hand over, send the rest after that.
    SwitchPostcopy,
}

/// A decision, why it was taken, and what it is expected to cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What to do.
    pub decision: Decision,
    /// Why, in words.
    pub reason: String,
    /// The blackout, if this is a switch: that of switching now, otherwise.
    pub blackout: Duration,
}

impl History<'_> {
    /// Bytes a second while really sending, of the last pass that sent enough to tell.
    pub fn bandwidth(&self) -> Option<f64> {
        self.passes.iter().rev().map(|pass| pass.bandwidth).find(|bandwidth| *bandwidth > 0).map(|bandwidth| bandwidth as f64)
    }

    /// The blackout that sending `pages` while the guest stands still would cost.
    pub fn blackout(&self, pages: u64, goal: &Goal) -> Duration {
        let Fixed { stop, harvest, round_trip, state_bytes } = self.fixed;
        let bytes = pages as f64 * PAGE_SIZE as f64 + state_bytes as f64;
        let sending = Duration::try_from_secs_f64(bytes / self.switchover_bandwidth(goal)).unwrap_or(Duration::MAX);
        sending.saturating_add(stop.unwrap_or(ASSUMED_STOP) + ASSUMED_LOAD + harvest + round_trip * 2)
    }

    /// Whether sending `pages` while the guest stands still keeps within the limit, or is so little that another pass would not leave less.
    pub fn fits(&self, pages: u64, goal: &Goal) -> bool {
        pages <= LITTLE || self.blackout(pages, goal) <= goal.downtime_limit
    }

    fn switchover_bandwidth(&self, goal: &Goal) -> f64 {
        goal.switchover_bandwidth.or(self.bandwidth()).unwrap_or(ASSUMED_BANDWIDTH).max(1.0)
    }

    /// The passes since the guest was last slowed down: those before tell of another guest.
    fn comparable(&self) -> &[Pass] {
        let Some(last) = self.passes.last() else { return &[] };
        let others = self.passes.iter().rposition(|pass| pass.throttle != last.throttle);
        self.passes.get(others.map_or(0, |index| index + 1)..).unwrap_or_default()
    }

    /// The part of what is left that another pass is expected to leave.
    fn expected_share(&self) -> f64 {
        let passes = self.comparable();
        let recent = passes.get(passes.len().saturating_sub(TOGETHER)..).unwrap_or_default();
        let mut shares: Vec<_> = recent.iter().map(share_left).collect();
        shares.sort_by(f64::total_cmp);
        // Of two the better one.
        shares.get(shares.len().saturating_sub(1) / 2).copied().unwrap_or(1.0)
    }

    /// Whether the last passes together have left hardly less than others before them.
    fn treads_water(&self) -> bool {
        let passes = self.comparable();
        let Some((before, recent)) = passes.len().checked_sub(TOGETHER).and_then(|at| passes.split_at_checked(at)) else { return false };
        let least = |passes: &[Pass]| passes.iter().map(|pass| pass.remaining_pages).min();
        least(before).zip(least(recent)).is_some_and(|(before, recent)| recent as f64 > before as f64 * WORTHWHILE)
    }
}

/// Decides what comes after the last pass, and says why.
pub fn decide(history: &History<'_>, goal: &Goal) -> Verdict {
    let none = Pass::default();
    let last = history.passes.last().unwrap_or(&none);
    if goal.mode == Mode::Postcopy {
        let reason = "postcopy at once was asked for".into();
        return Verdict { decision: Decision::SwitchPostcopy, reason, blackout: history.blackout(0, goal) };
    }
    // What the guest dirties until it stands still is to be sent as well.
    let stop = history.fixed.stop.unwrap_or(ASSUMED_STOP);
    let while_stopping = per_second(last.dirtied_pages, last.duration_us) * stop.as_secs_f64();
    let blackout = history.blackout(last.remaining_pages + while_stopping as u64, goal);
    let rate = megabytes_a_second(history.switchover_bandwidth(goal));
    let limit = format!("the limit of {} ms", goal.downtime_limit.as_millis());
    let left = format!(
        "pass {} left {} at {rate}, a blackout of {:.1} ms",
        last.number,
        megabytes(last.remaining_pages as f64),
        blackout.as_secs_f64() * 1e3
    );
    let verdict = |decision, reason| Verdict {
        decision,
        reason,
        blackout: if decision == Decision::SwitchPostcopy { history.blackout(0, goal) } else { blackout },
    };
    if goal.postcopy_requested && goal.mode != Mode::Precopy {
        return verdict(Decision::SwitchPostcopy, format!("{left}; postcopy was asked for"));
    }
    if blackout <= goal.downtime_limit {
        // One that does not pay ends it: the limit is kept, so nothing else is to be gained.
        let share = share_left(last);
        if last.remaining_pages > LITTLE && share < BETTER_STILL {
            let next = megabytes(last.remaining_pages as f64 * share);
            let reason = format!("{left}, within {limit}, but pass {} would leave {next}: another pass", last.number + 1);
            return verdict(Decision::AnotherPass, reason);
        }
        return verdict(Decision::SwitchPrecopy, format!("{left}, within {limit}: switch"));
    }
    if last.remaining_pages <= LITTLE {
        let reason = format!("{left}, above {limit}, but next to nothing of it is pages, so that no pass can shorten it: switch");
        return verdict(Decision::SwitchPrecopy, reason);
    }
    let share = history.expected_share();
    let next = megabytes(last.remaining_pages as f64 * share.min(1.0));
    let outlook = format!("{left}, above {limit}; pass {} would leave {next} at {rate}", last.number + 1);
    let treads_water = history.treads_water();
    if share < WORTHWHILE && !treads_water {
        return verdict(Decision::AnotherPass, format!("{outlook}: another pass"));
    }
    let outlook = if treads_water { format!("{outlook}, as the last {TOGETHER} passes did no better") } else { outlook };
    if goal.mode == Mode::Auto {
        return verdict(Decision::SwitchPostcopy, format!("{outlook}: postcopy"));
    }
    let why = format!(
        "{outlook}: the guest dirties {}, the link carries {}",
        megabytes_a_second(per_second(last.dirtied_pages, last.duration_us) * PAGE_SIZE as f64),
        megabytes_a_second(per_second(last.normal_pages, last.duration_us) * PAGE_SIZE as f64),
    );
    match goal.throttling {
        Some(throttling) if last.throttle < throttling.max => {
            let percent = throttling.next(last.throttle, share);
            verdict(Decision::Throttle(percent), format!("{why}; its vCPUs are to stand still {percent} % of the time"))
        }
        Some(_) => verdict(Decision::AnotherPass, format!("{why}, and its vCPUs may not be slowed down any further")),
        None => verdict(Decision::AnotherPass, format!("{why}, so precopy cannot end within the limit")),
    }
}

/// Which part of what a pass was to send it left.
fn share_left(pass: &Pass) -> f64 {
    pass.remaining_pages as f64 / pass.sent_pages().max(1) as f64
}

fn per_second(count: u64, duration_us: u64) -> f64 {
    count as f64 * 1e6 / duration_us.max(1) as f64
}

fn megabytes(pages: f64) -> String {
    let megabytes = pages * PAGE_SIZE as f64 / 1e6;
    if megabytes < 10.0 { format!("{megabytes:.1} MB") } else { format!("{megabytes:.0} MB") }
}

fn megabytes_a_second(bytes_a_second: f64) -> String {
    format!("{:.0} MB/s", bytes_a_second / 1e6)
}

#[cfg(test)]
mod tests;
