//! A process that stands still for a while, stopped by a signal or by its host: its kernel accepts connections and keeps what comes, and
//! only its silence tells.

use std::time::Duration;

use ferry::migrate::report::Status;

use super::World;

/// Beyond its time limit nobody may take longer to notice, in simulated time that passes quickly.
const SLACK: Duration = Duration::from_secs(90);
const PAGE_TIMEOUT: Duration = Duration::from_secs(30);
const END_TIMEOUT: Duration = Duration::from_secs(120);
/// Where a disk is copied, which may take its time to be flushed.
const END_TIMEOUT_WITH_DISKS: Duration = Duration::from_secs(1800);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

pub(super) struct Freeze {
    side: Side,
    since: Duration,
    /// The step with which it ends.
    until: u64,
}

impl World {
    pub(super) fn is_frozen(&self, side: Side) -> bool {
        self.freeze.as_ref().is_some_and(|freeze| freeze.side == side)
    }

    /// Begins, unless a side is frozen already.
    pub(super) fn freeze(&mut self, side: Side) -> bool {
        if self.freeze.is_some() {
            return false;
        }
        self.freeze = Some(Freeze { side, since: self.now, until: self.step + 50 + self.choices.below(1200) });
        true
    }

    /// How long the next step takes. Judges the other side when a freeze ends.
    pub(super) fn pass_time(&mut self) -> Result<Duration, String> {
        let Some(freeze) = &self.freeze else { return Ok(Duration::from_micros(20)) };
        if self.step < freeze.until {
            return Ok(Duration::from_millis(500));
        }
        self.check_noticed(freeze)?;
        self.freeze = None;
        self.say("thawed");
        Ok(Duration::from_micros(20))
    }

    /// Whoever was owed something by the frozen side has noticed.
    fn check_noticed(&self, freeze: &Freeze) -> Result<(), String> {
        let long_ago = |event: Duration, limit: Duration| event.max(freeze.since) + limit + SLACK < self.now;
        let (source, destination) = (&self.source, &self.destination);
        let is_silent = match freeze.side {
            Side::Source if destination.alive && destination.engine.status() == Status::PostcopyActive => {
                let since = destination.engine.waiting_since().map(|since| since.max(destination.heard_at));
                since.is_some_and(|since| long_ago(since, PAGE_TIMEOUT))
            }
            Side::Destination if source.alive && source.outcome.is_none() && !source.engine.is_paused() && !source.engine.is_over() => {
                let limit = if self.plan.blocks > 0 { END_TIMEOUT_WITH_DISKS } else { END_TIMEOUT };
                source.end_sent.is_some_and(|sent| long_ago(sent, limit))
            }
            _ => false,
        };
        if is_silent {
            return Err(format!("the {:?} has hung for long, and the other side does not say so", freeze.side));
        }
        Ok(())
    }
}
