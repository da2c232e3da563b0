//! From the guest's stop to the commit point.

use std::time::Duration;

use super::{Action, LONGEST_CALM, OutgoingBitmaps, Source, State, Stopped};
use crate::memory::{PAGE_SIZE, PageRun};
use crate::migrate::report::{Downtime, Mode, microseconds};
use crate::migrate::wire::Frame;

impl Source {
    /// The guest stands still. In the time between the decision and the pause it may have dirtied more than was expected: then `auto`
    /// leaves the rest to postcopy, and `precopy` lets the guest go on rather than break the limit.
    pub(super) fn on_stopped(&mut self, stopped: Stopped, now: Duration) {
        self.outgoing.begin_pass(&stopped.dirty);
        if let Some(failure) = self.failure.take() {
            self.actions.push_back(Action::Resume);
            return self.fail_here(failure, now);
        }
        let left = self.unsent().len();
        self.fixed.stop = Some(Duration::from_micros(stopped.stop_us + stopped.device_state_us));
        self.fixed.harvest = Duration::from_micros(stopped.last_sync_us);
        self.fixed.state_bytes = (stopped.machine.len() as u64).saturating_sub((stopped.rest.len() * PAGE_SIZE) as u64);
        if !self.switch_postcopy && !self.history().fits(left, &self.goal()) {
            let reason = format!("{left} pages were dirtied until the guest stood still, too many for the limit");
            if self.config.mode == Mode::Auto {
                self.switch_postcopy = true;
                self.report.reason = format!("{reason}: postcopy");
                self.report.downtime.predicted_us = microseconds(self.history().blackout(0, &self.goal()));
            } else {
                self.report.reason = format!("{reason}: another pass");
                self.actions.push_back(Action::Resume);
                return self.begin_pass(now);
            }
        }
        self.outgoing.stand_still();
        // It stands still anyway, and wherever it goes on, it is to go on as it likes.
        self.set_throttle(0);
        // The driver does what it can, such as flushing disks, before it stops the guest.
        self.stopped_at = now.saturating_sub(Duration::from_micros(stopped.stop_us + stopped.device_state_us + stopped.last_sync_us));
        self.report.downtime = Downtime {
            stop_us: stopped.stop_us,
            device_state_us: stopped.device_state_us,
            last_sync_us: stopped.last_sync_us,
            predicted_us: self.report.downtime.predicted_us,
            ..Downtime::default()
        };
        if self.switch_postcopy {
            self.outgoing.begin_postcopy();
        } else {
            stopped.rest.iter().for_each(|page| self.outgoing.take(PageRun::single(*page)));
        }
        self.bitmaps = OutgoingBitmaps::new(&stopped.bitmaps);
        self.package = Some(stopped);
        self.begin_switchover(now);
    }

    /// The commit point. The guest is given up here *before* the destination is told to run it: if anything breaks in between, nobody
    /// runs it until the two meet again, but never do two.
    pub(super) fn on_ready(&mut self, load_us: u64, warnings: Vec<String>, now: Duration) {
        self.report.warnings.extend(warnings);
        self.report.downtime.load_us = load_us;
        self.report.downtime.transfer_us = ((now - self.sent_package_at).as_micros() as u64).saturating_sub(load_us);
        self.ready_at = now;
        self.calm_until = now + LONGEST_CALM;
        self.actions.push_back(Action::GiveUp);
        self.send(Frame::Commit);
        self.enter(State::Committed, None);
    }
}
