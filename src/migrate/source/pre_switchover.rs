//! The wait for a person between the guest's stop and its switch, where that was asked for.

use std::time::Duration;

use super::{Source, State};
use crate::migrate::report::microseconds;

impl Source {
    /// Whether the guest stands still until a person says [`Input::Continue`](super::Input::Continue), or cancels.
    pub fn waits_before_switchover(&self) -> bool {
        self.state == State::PreSwitchover
    }

    /// The guest stands still and is to be handed over: at once, or when a person says so.
    pub(super) fn begin_switchover(&mut self, now: Duration) {
        self.sent_package_at = now;
        let next = if self.pause_before_switchover { State::PreSwitchover } else { State::LastPass };
        self.enter(next, None);
    }

    /// A person says so. What was harvested when the guest stopped is still all: its vCPUs stand still, its devices were drained before
    /// they were saved, and nobody else writes its RAM.
    pub(super) fn on_continue(&mut self, now: Duration) {
        self.report.downtime.pre_switchover_us = microseconds(now.saturating_sub(self.sent_package_at));
        self.sent_package_at = now;
        self.enter(State::LastPass, None);
    }
}
