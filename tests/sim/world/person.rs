//! The person who looks after both hosts, and knows which of them live.

use ferry::migrate::{destination, source};

use super::{Right, World};

impl World {
    /// Joins again what is paused, and ends what waits in vain.
    pub(super) fn person_acts(&mut self) {
        if self.plan.patience == 0 || self.choices.below(self.plan.patience) != 0 {
            return;
        }
        if self.source.alive && self.source.engine.is_paused() && self.is_listening() {
            self.say("person: recover");
            self.source.engine.handle(source::Input::Recover, self.now);
        }
        if !self.destination.alive || !self.destination.engine.is_paused() {
            return;
        }
        let is_committed = self.destination.engine.is_committed();
        let stayed = self.source.outcome.is_some() && self.source.right == Right::Running;
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
