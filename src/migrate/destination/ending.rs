//! How the migration comes to its end at the destination, well or otherwise, and how a link does.

use super::{Action, Destination, Durable, Outcome, State};
use crate::memory::PageSet;
use crate::migrate::wire::{Channel, Frame};

impl Destination {
    /// Complete only when nothing is missing, every bitmap in the queue has been dealt with, and the source says that it has sent all, unless
    /// it cannot say anything.
    pub(super) fn check_complete(&mut self) {
        let all_here = self.incoming.is_whole() && self.bitmaps.all_complete() && self.actions.is_empty();
        if self.state == State::Running && all_here && (self.end_received || self.lost.is_some()) {
            if self.layout.has_disks() && self.durable != Durable::Yes {
                // The source keeps its images until DONE, and then nobody has what a crash of this host takes.
                if self.durable == Durable::No {
                    self.durable = Durable::Asked;
                    self.actions.push_back(Action::FlushDisks);
                }
                return;
            }
            // First: a guest that has ended meanwhile ends this process as soon as it is complete, and the source would take the silence
            // for a loss.
            if self.lost.is_none() {
                self.done();
            }
            self.complete();
            if self.alone {
                self.finish(Outcome::Completed);
            }
        }
    }

    pub(super) fn complete(&mut self) {
        // The handle of the migration stays as long as the guest, and with it what this engine holds.
        self.written = PageSet::empty(0);
        self.incoming.forget_pages();
        self.actions.push_back(Action::Complete);
        self.enter(State::Whole, None);
    }

    pub(super) fn done(&mut self) {
        let done = Frame::Done {
            faults: Box::new(self.faults().unwrap_or_default()),
            warnings: self.warnings.clone(),
            block_waits: self.block_waits().filter(|_| self.version >= 3).map(Box::new),
        };
        self.send(Channel::Main, done);
    }

    /// Something went wrong. Before READY that ends the migration, from then on only the link: the source may have given the guest up.
    pub(super) fn fail(&mut self, reason: &str) {
        if self.state == State::Ready || self.is_committed() {
            return self.pause(reason);
        }
        self.actions.clear();
        self.send(Channel::Main, Frame::Abort(reason.into()));
        self.finish(Outcome::Abandoned(reason.into()));
    }

    /// Something could not be done here, which the source is told where it cannot know.
    pub(super) fn fail_here(&mut self, reason: &str) {
        let is_told = self.is_committed() && self.lost.is_none();
        self.fail(reason);
        if is_told {
            // Before the connection is closed.
            let disconnect = self.actions.pop_back();
            self.send(Channel::Main, Frame::Abort(reason.into()));
            self.actions.extend(disconnect);
        }
    }

    /// The link is lost, and may come back. What it brought is dealt with; what it was to carry is told on the next one.
    pub(super) fn pause(&mut self, reason: &str) {
        if self.lost.is_some() {
            return;
        }
        self.lost = Some(reason.into());
        self.urgent = false;
        self.page_channels = 0;
        self.end_received = false;
        // A connection that was not taken up yet must be, to be closed.
        self.actions.retain(|action| !matches!(action, Action::Send(..)));
        self.actions.push_back(Action::Disconnect(reason.into()));
    }

    pub(super) fn finish(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome.clone());
        self.actions.push_back(Action::End(outcome));
        self.enter(State::Ended, None);
    }
}
