//! From pass to pass: what each has cost, and what is decided after it.

use std::time::Duration;

use super::{ANSWER_TIMEOUT, Action, MAX_PASSES, PassMeter, Source, State};
use crate::memory::PageSet;
use crate::migrate::policy::{self, Decision, Verdict};
use crate::migrate::report::{Mode, Pass, microseconds};
use crate::migrate::wire::Frame;

impl Source {
    /// What was dirtied since the last harvest is known: what comes next?
    pub(super) fn on_harvested(&mut self, dirty: &PageSet, now: Duration) {
        if self.dry_run.is_some() {
            return self.on_dry_run_harvest(dirty, now);
        }
        self.fixed.harvest = now.saturating_sub(self.asked_at);
        self.outgoing.begin_pass(dirty);
        if (self.config.mode == Mode::Postcopy || self.postcopy_requested) && !self.destination_built {
            // A pass without pages: its acknowledgement says that the machine is built, which must not happen in the blackout.
            self.send(Frame::PassEnd(self.totals));
            self.enter(State::PassAck, Some(now + ANSWER_TIMEOUT));
            return;
        }
        if self.pass.number == 0 && self.config.mode != Mode::Postcopy && !self.postcopy_requested {
            return self.begin_pass(now);
        }
        if self.pass.number > 0 {
            self.record_pass(dirty.len(), now);
        }
        let Verdict { decision, reason, blackout } = policy::decide(&self.history(), &self.goal());
        if let Some(pass) = self.report.passes.last_mut() {
            pass.decision.clone_from(&reason);
        }
        self.report.reason = reason;
        match decision {
            Decision::AnotherPass => self.begin_pass(now),
            Decision::Throttle(percent) => {
                self.set_throttle(percent);
                self.begin_pass(now);
            }
            Decision::SwitchPrecopy | Decision::SwitchPostcopy => {
                self.report.downtime.predicted_us = microseconds(blackout);
                self.switch_postcopy = decision == Decision::SwitchPostcopy;
                self.actions.push_back(Action::Stop);
                self.enter(State::Stopping, None);
            }
        }
    }

    /// Sends all that is unsent.
    pub(super) fn begin_pass(&mut self, now: Duration) {
        self.pass = PassMeter { number: self.pass.number + 1, began: now, ..PassMeter::default() };
        self.enter(State::Sending, None);
    }

    /// Adds the pass that has ended to the report, which is the history that the policy goes by.
    fn record_pass(&mut self, dirtied_pages: u64, now: Duration) {
        if self.report.passes.len() == MAX_PASSES {
            self.report.passes.remove(0);
        }
        // A host that was busy when the guest was to stop once is given another chance.
        self.fixed.stop = self.fixed.stop.map(|stop| stop * 3 / 4);
        self.report.passes.push(Pass {
            number: self.pass.number,
            duration_us: microseconds(now.saturating_sub(self.pass.began)),
            normal_pages: self.pass.sent.normal,
            zero_pages: self.pass.sent.zero,
            dirtied_pages,
            remaining_pages: self.unsent().len(),
            bandwidth: self.pass_bandwidth(),
            throttle: self.throttle,
            decision: String::new(),
        });
    }

    /// The guest's vCPUs stand still for `percent` of the time from now on.
    pub(super) fn set_throttle(&mut self, percent: u8) {
        if self.throttle != percent {
            self.throttle = percent;
            self.actions.push_back(Action::Throttle(percent));
        }
    }
}
