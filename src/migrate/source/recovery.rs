//! The link after the commit: lost, and joined again. What is to be said on it next is made up for by what the destination then says it has.

use super::{Action, Source, State};
use crate::memory::PageSet;
use crate::migrate::wire::{Frame, Holding};

impl Source {
    /// Whether the link was lost after the commit, and nobody has asked yet for another one.
    pub fn is_paused(&self) -> bool {
        self.state == State::Paused
    }

    pub(super) fn is_disconnecting(&self) -> bool {
        self.actions.iter().any(|action| matches!(action, Action::Disconnect(_)))
    }

    /// Whether a person may break the link. Not while the driver is giving the guest up: that may still fail, and then the guest goes on.
    pub fn may_be_paused(&self) -> bool {
        self.is_committed() && !self.is_over() && !self.actions.contains(&Action::Send(Frame::Commit))
    }

    /// Whether the destination may have said READY without hearing that the guest was not given up: it waits for a word.
    pub fn may_be_waited_for(&self) -> bool {
        self.package_sent && !self.given_up
    }

    /// The link is lost after the commit: what is still to go stays here until there is another one.
    pub(super) fn pause(&mut self, reason: &str) {
        if self.state == State::Paused {
            return;
        }
        let text = format!("{reason}; this came after the commit, so the guest belongs to the destination and does not run here again");
        self.report.error = Some(text.clone());
        // A `Commit` that has not gone out is made up for by the recovery.
        self.actions.clear();
        self.requested.clear();
        self.actions.push_back(Action::Disconnect(text));
        self.enter(State::Paused, None);
    }

    /// The destination is back: what it lacks is to go, whatever went before.
    pub(super) fn on_holding(&mut self, holding: &Holding) -> Result<(), String> {
        let mut missing = PageSet::empty(self.config.layout.pages());
        for &run in &holding.missing {
            let layout = &self.config.layout;
            if !layout.holds(run) || !layout.divides(run) || missing.insert(run) != run.count {
                return Err(format!("the destination's list of missing pages is wrong at {run}"));
            }
        }
        if !missing.is_empty() && !self.switch_postcopy {
            return Err("the destination says that pages are missing after a precopy".into());
        }
        self.bitmaps.go_to(holding.bitmaps)?;
        self.outgoing.restart(missing);
        self.actions.push_back(Action::OpenOthers);
        // Of the link before, whose driver is done with it.
        self.in_flight = 0;
        if !holding.committed {
            self.send(Frame::Commit);
        }
        self.report.error = None;
        self.report.recoveries += 1;
        self.enter(State::Committed, None);
        Ok(())
    }
}
