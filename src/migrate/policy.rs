//! When to go on with precopy, when to switch, and how: a pure function of what was measured, with its reason in words.

use std::time::Duration;

use super::report::Mode;
use crate::memory::PAGE_SIZE;

/// What a finished pass left behind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// What the person asked for.
    pub mode: Mode,
    /// Longest blackout the person accepts.
    pub downtime_limit: Duration,
    /// The pass, counted from 1.
    pub pass: u32,
    /// Pages that were to be sent in it.
    pub sent_pages: u64,
    /// Pages dirtied while it ran: what another pass, or the last one, would send.
    pub remaining_pages: u64,
    /// Bytes a second while really sending, if enough was sent to tell.
    pub bandwidth: Option<f64>,
    /// Whether a person asked for postcopy now.
    pub postcopy_requested: bool,
}

/// What to do after a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send what was dirtied and look again.
    AnotherPass,
    /// Stop the guest, send the rest, hand over.
    SwitchPrecopy,
    /// Stop the guest, hand over, send the rest after that.
    SwitchPostcopy,
}

/// Used until a pass has sent enough to measure: a slow gigabit link, in bytes a second.
const ASSUMED_BANDWIDTH: f64 = 100e6;
/// The part of the blackout that does not depend on RAM: stop, state, load, commit.
pub const FIXED_DOWNTIME: Duration = Duration::from_millis(3);
/// Pages that go in less time than the fixed part of the blackout takes.
const LITTLE: u64 = 64;
/// Another pass pays when it leaves less than this part of what the last one sent.
const WORTHWHILE: f64 = 0.7;

/// The blackout that sending `pages` while the guest stands still would cost.
pub fn expected_downtime(pages: u64, bandwidth: Option<f64>) -> Duration {
    let bytes = pages as f64 * PAGE_SIZE as f64;
    FIXED_DOWNTIME + Duration::from_secs_f64(bytes / bandwidth.unwrap_or(ASSUMED_BANDWIDTH).max(1.0))
}

/// Whether sending `pages` while the guest stands still keeps within `limit`, or is so little that another pass would not leave less.
pub fn fits(pages: u64, bandwidth: Option<f64>, limit: Duration) -> bool {
    pages <= LITTLE || expected_downtime(pages, bandwidth) <= limit
}

/// Decides what comes after a pass, and says why.
pub fn decide(measured: &Measured) -> (Decision, String) {
    let Measured { mode, downtime_limit, pass, sent_pages, remaining_pages, bandwidth, postcopy_requested } = *measured;
    let expected = expected_downtime(remaining_pages, bandwidth);
    let left = format!(
        "pass {pass} left {:.1} MiB, at {:.0} MB/s a blackout of {:.1} ms",
        (remaining_pages * PAGE_SIZE as u64) as f64 / f64::from(1 << 20),
        bandwidth.unwrap_or(ASSUMED_BANDWIDTH) / 1e6,
        expected.as_secs_f64() * 1e3,
    );
    let limit = format!("the limit of {} ms", downtime_limit.as_millis());
    if mode == Mode::Postcopy {
        return (Decision::SwitchPostcopy, "postcopy at once was asked for".into());
    }
    if postcopy_requested && mode != Mode::Precopy {
        return (Decision::SwitchPostcopy, format!("{left}; postcopy was asked for"));
    }
    if fits(remaining_pages, bandwidth, downtime_limit) {
        return (Decision::SwitchPrecopy, format!("{left}: within {limit}, or as near to it as can be"));
    }
    let helps = (remaining_pages as f64) < sent_pages as f64 * WORTHWHILE;
    match mode {
        Mode::Auto if !helps => {
            (Decision::SwitchPostcopy, format!("{left}, above {limit}, and another pass would leave as much: postcopy"))
        }
        _ if helps => (Decision::AnotherPass, format!("{left}, above {limit}: another pass helps")),
        _ => (
            Decision::AnotherPass,
            format!("{left}, above {limit}; the guest dirties memory as fast as it is sent, and postcopy is not allowed"),
        ),
    }
}

#[cfg(test)]
mod tests;
