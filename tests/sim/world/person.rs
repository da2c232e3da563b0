//! The person who looks after both hosts, and knows which of them live.

use ferry::migrate::{destination, source};

use super::freeze::Side;
use super::{Right, World};
use crate::plan::From;

/// One chance in so many steps that a person who is waited for before the switch makes up their mind.
const CONSIDERS: u64 = 300;

impl World {
    /// Ends the wait before the switch, joins again what is paused, and ends what waits in vain.
    pub(super) fn person_acts(&mut self) {
        if self.source.alive && self.source.engine.waits_before_switchover() && !self.is_frozen(Side::Source) {
            if self.plan.from == From::PreSwitchover {
                self.plan_begins.get_or_insert(self.step);
            }
            if self.choices.below(CONSIDERS) == 0 {
                if self.choices.chance(self.plan.cancels) {
                    self.say("person: cancel");
                    self.source_is_ended_by(source::Input::Cancel);
                } else {
                    self.say("person: continue");
                    self.source.engine.handle(source::Input::Continue, self.now);
                }
            }
        }
        if self.plan.patience == 0 || self.choices.below(self.plan.patience) != 0 {
            return;
        }
        if self.source.alive && self.source.engine.is_paused() && self.is_listening() && !self.is_frozen(Side::Source) {
            self.say("person: recover");
            self.source.engine.handle(source::Input::Recover, self.now);
        }
        if !self.destination.alive || !self.destination.engine.is_paused() || self.is_frozen(Side::Destination) {
            return;
        }
        let is_committed = self.destination.engine.is_committed();
        let stayed = self.source.outcome.is_some() && self.source.right != Right::GivenUp;
        if !is_committed && (!self.source.alive || stayed) {
            self.say("person: give the wait up");
            self.destination.engine.handle(destination::Input::GiveUp("the source is not coming".into()));
        } else if is_committed && !self.source.alive && self.destination.engine.missing().is_empty() {
            self.say("person: give the rest up");
            self.destination.engine.handle(destination::Input::GiveUpRest);
        }
    }

    /// Whether a connection to the destination can be opened.
    pub(super) fn is_listening(&self) -> bool {
        self.destination.alive && self.destination.outcome.is_none()
    }
}
