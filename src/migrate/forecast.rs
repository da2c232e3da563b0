//! What a dry run tells: how a migration would go in each mode, by the policy that would decide in it and a guest that dirties memory as
//! it was watched to do.

use std::num::NonZeroU64;
use std::time::Duration;

use super::policy::{self, Decision, Fixed, Goal, History};
use super::report::{Forecast, Mode, Pass, microseconds};
use crate::memory::PAGE_SIZE;

/// A precopy that takes more passes than this is taken for one that does not end.
const MAX_PASSES: u32 = 60;

/// What was watched.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Pages that a first pass would send.
    pub pages: u64,
    /// How many different pages were dirtied within which time, growing.
    pub dirtied: Vec<(Duration, u64)>,
    /// Bytes a second that a pass sends, limits included.
    pub throughput: f64,
    /// Bytes a second while really sending; 0 if too little was sent to tell.
    pub bandwidth: u64,
    /// Bytes a second that postcopy may send in the background, if a person has limited them.
    pub postcopy_limit: Option<NonZeroU64>,
    /// What the blackout costs beside pages.
    pub fixed: Fixed,
}

impl Observed {
    /// How many different pages the guest dirties within `time`. Beyond what was watched it goes on as it did at the end.
    fn dirtied_within(&self, time: Duration) -> u64 {
        let (mut from, mut to) = ((0.0, 0.0), (0.0, 0.0));
        for &(at, pages) in &self.dirtied {
            (from, to) = (to, (at.as_secs_f64(), pages as f64));
            if at >= time {
                break;
            }
        }
        let slope = if to.0 > from.0 { (to.1 - from.1) / (to.0 - from.0) } else { 0.0 };
        ((from.1 + (time.as_secs_f64() - from.0) * slope).max(0.0) as u64).min(self.pages)
    }

    /// How a migration in `goal.mode` would go.
    pub fn forecast(&self, goal: &Goal) -> Forecast {
        let (mut passes, mut total) = (Vec::new(), Duration::ZERO);
        let (mut sent, mut throttle) = (self.pages, 0);
        // Precopy's limit, which the throughput was measured under, is not postcopy's.
        let link = if self.bandwidth > 0 { self.bandwidth as f64 } else { self.throughput };
        let background = self.postcopy_limit.map_or(link, |limit| link.min(limit.get() as f64));
        loop {
            let number = passes.len() as u32 + 1;
            if goal.mode != Mode::Postcopy {
                let duration = time_for(sent, self.throughput).saturating_add(self.fixed.round_trip + self.fixed.harvest);
                let dirtied = self.dirtied_within(duration / 100 * u32::from(100 - throttle));
                total = total.saturating_add(duration);
                passes.push(Pass {
                    number,
                    duration_us: microseconds(duration),
                    normal_pages: sent,
                    dirtied_pages: dirtied,
                    remaining_pages: dirtied,
                    bandwidth: self.bandwidth,
                    throttle,
                    ..Pass::default()
                });
                sent = dirtied;
            }
            let verdict = policy::decide(&History { passes: &passes, fixed: self.fixed }, goal);
            match verdict.decision {
                Decision::Throttle(percent) if number < MAX_PASSES => throttle = percent,
                Decision::AnotherPass if number < MAX_PASSES => {}
                decision => {
                    let postcopy = decision == Decision::SwitchPostcopy;
                    let ends = postcopy || decision == Decision::SwitchPrecopy;
                    let rest = if postcopy { time_for(sent, background) } else { Duration::ZERO };
                    return Forecast {
                        mode: goal.mode,
                        ends,
                        postcopy,
                        passes: passes.len() as u32,
                        total_us: if ends { microseconds(total.saturating_add(verdict.blackout).saturating_add(rest)) } else { 0 },
                        downtime_us: microseconds(verdict.blackout),
                        throttle,
                        reason: verdict.reason,
                    };
                }
            }
        }
    }
}

fn time_for(pages: u64, bytes_a_second: f64) -> Duration {
    Duration::try_from_secs_f64(pages as f64 * PAGE_SIZE as f64 / bytes_a_second.max(1.0)).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::policy::Throttling;

    /// 1 GiB over 400 MB/s; so many pages a second are dirtied, within `hot` of them.
    fn observed(rate: u64, hot: u64) -> Observed {
        let dirtied = [50, 100, 200, 500, 1000, 2000, 3000];
        Observed {
            pages: 1 << 18,
            dirtied: dirtied.map(|ms| (Duration::from_millis(ms), (rate * ms / 1000).min(hot))).to_vec(),
            throughput: 400e6,
            bandwidth: 400_000_000,
            postcopy_limit: None,
            fixed: Fixed::default(),
        }
    }

    fn goal(mode: Mode) -> Goal {
        Goal { mode, downtime_limit: Duration::from_millis(50), switchover_bandwidth: None, postcopy_requested: false, throttling: None }
    }

    #[test]
    fn dirtied_pages_are_between_and_beyond_what_was_watched() {
        let observed = observed(1000, 1 << 18);
        for (ms, pages) in [(0, 0), (10, 10), (75, 75), (2500, 2500), (10_000, 10_000), (10_000_000, 1 << 18)] {
            assert_eq!(observed.dirtied_within(Duration::from_millis(ms)), pages, "{ms}");
        }
        let hot = super::tests::observed(100_000, 5000);
        assert_eq!(hot.dirtied_within(Duration::from_secs(10)), 5000);
        assert_eq!(Observed::default().dirtied_within(Duration::from_secs(1)), 0);
    }

    #[test]
    fn a_quiet_guest_moves_alike_in_all_modes() {
        for mode in [Mode::Auto, Mode::Precopy] {
            let Forecast { ends, postcopy, passes, total_us, downtime_us, .. } = observed(10, 1 << 18).forecast(&goal(mode));
            assert!(ends && !postcopy && passes == 1, "{passes}");
            assert!((2_600_000..2_900_000).contains(&total_us), "{total_us}");
            assert!((3000..50_000).contains(&downtime_us), "{downtime_us}");
        }
        let postcopy = observed(10, 1 << 18).forecast(&goal(Mode::Postcopy));
        assert!(postcopy.ends && postcopy.postcopy && postcopy.passes == 0 && postcopy.downtime_us < 10_000, "{postcopy:?}");
    }

    #[test]
    fn a_guest_that_is_too_fast_ends_by_postcopy_only_or_slowed_down() {
        let observed = observed(1_000_000, 1 << 18);
        let auto = observed.forecast(&goal(Mode::Auto));
        assert!(auto.ends && auto.postcopy && auto.passes == 1, "{auto:?}");
        let precopy = observed.forecast(&goal(Mode::Precopy));
        assert!(!precopy.ends && precopy.reason.contains("the guest dirties") && precopy.total_us == 0, "{precopy:?}");
        let throttling = Some(Throttling { initial: 20, increment: 10, max: 99, tailslow: false });
        let slowed = observed.forecast(&Goal { throttling, ..goal(Mode::Precopy) });
        assert!(slowed.ends && slowed.throttle >= 90, "{slowed:?}");
    }

    #[test]
    fn a_limit_of_postcopy_lengthens_postcopy_alone() {
        let seconds = |limit, mode| {
            let observed = Observed { postcopy_limit: NonZeroU64::new(limit), ..observed(1_000_000, 1 << 18) };
            let Forecast { ends, postcopy, total_us, downtime_us, .. } = observed.forecast(&goal(mode));
            assert!(!postcopy || downtime_us < 10_000, "no limit applies while the guest stands still");
            (ends, total_us / 1_000_000)
        };
        // 1 GiB takes 2.7 s at 400 MB/s and 10.7 s at 100 MB/s; a limit above what the link carries is none.
        for (limit, postcopy) in [(0, 2), (100_000_000, 10), (4_000_000_000, 2)] {
            assert_eq!(seconds(limit, Mode::Postcopy), (true, postcopy));
            assert_eq!(seconds(limit, Mode::Precopy), (false, 0));
        }
        // One pass goes before it.
        assert_eq!(seconds(100_000_000, Mode::Auto), (true, 13));
    }

    #[test]
    fn a_small_hot_set_is_no_hindrance() {
        // 10 MiB, hot: sending them takes 26 ms, in which not all of them are dirtied again.
        let precopy = observed(1_000_000, 2560).forecast(&goal(Mode::Precopy));
        assert!(precopy.ends && precopy.passes == 2 && precopy.downtime_us < 25_000, "{precopy:?}");
    }
}
