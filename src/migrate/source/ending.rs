//! How a migration ends, and what becomes of the guest then.

use std::time::Duration;

use super::{Action, Outcome, Source, State};
use crate::migrate::report::Status;
use crate::migrate::wire::Frame;

/// How the error of a migration that was given up ends.
const GOES_ON: &str = "; the guest goes on at the source";

/// Why a migration does not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    Cancelled,
    /// There is no guest any more; how it ended.
    GuestEnded(String),
    Failed(String),
}

impl Source {
    /// Ends the migration before the commit, and the guest goes on here; after it, the link.
    pub(super) fn fail(&mut self, failure: Failure, now: Duration) {
        if self.is_committed() {
            match failure {
                Failure::Failed(reason) => self.pause(&reason),
                // No guest that is the destination's ends here.
                Failure::Cancelled | Failure::GuestEnded(_) => {}
            }
            return;
        }
        if self.state == State::Stopping && !self.actions.contains(&Action::Stop) {
            // The driver is stopping the guest; it can go on only when it stands still.
            self.failure = Some(failure);
            return;
        }
        // What was still to be done is about a migration that is over, `GiveUp` and `Commit` included; but not what the guest needs to go on
        // as before.
        self.actions.retain(|action| matches!(action, Action::Throttle(_) | Action::Resume));
        if matches!(self.state, State::PreSwitchover | State::LastPass | State::Switching | State::Committed) {
            self.actions.push_back(Action::Resume);
        }
        self.fail_here(failure, now);
    }

    pub(super) fn fail_here(&mut self, failure: Failure, now: Duration) {
        let (text, error, status) = match failure {
            Failure::Cancelled => {
                ("the migration was cancelled at the source".into(), format!("the migration was cancelled{GOES_ON}"), Status::Cancelled)
            }
            Failure::GuestEnded(how) => {
                let error = format!("the guest ended while it was being moved: {how}");
                (error.clone(), error, Status::Failed)
            }
            Failure::Failed(reason) => (format!("the source gave up: {reason}"), format!("{reason}{GOES_ON}"), Status::Failed),
        };
        self.set_throttle(0);
        self.send(Frame::Abort(text));
        self.report.error = Some(error);
        self.finish(status, now);
    }

    /// The guest stays paused here, and so the migration that stopped it ends, or has ended with another error than it was to have.
    pub(super) fn on_resume_failed(&mut self, reason: &str, now: Duration) {
        if self.state != State::Ended {
            self.fail(Failure::Failed(reason.into()), now);
        }
        let Some(error) = &mut self.report.error else { return };
        let what_failed = error.strip_suffix(GOES_ON).unwrap_or(error);
        *error = format!("{what_failed}; the guest stays paused at the source: {reason}");
        if let Some(Action::End(outcome)) = self.actions.back_mut() {
            **outcome = Outcome::NotMoved(self.report.clone());
        }
    }

    pub(super) fn finish(&mut self, status: Status, now: Duration) {
        self.report.status = status;
        self.report.total_us = now.as_micros() as u64;
        let report = self.report.clone();
        self.actions.push_back(Action::End(Box::new(match status {
            Status::Completed => Outcome::Completed(report),
            _ => Outcome::NotMoved(report),
        })));
        self.enter(State::Ended, None);
    }
}
