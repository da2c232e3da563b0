//! Pages that arrive: where they go, and when all that were sent are here.

use super::{Action, Destination, Placement, State};
use crate::memory::PageRun;
use crate::migrate::wire::{Channel, Frame, MAX_RUN, Package, Totals};

/// What must not be dealt with before all pages that were sent before it are in place.
#[derive(Clone, Debug)]
pub(super) enum Ahead {
    PassEnd(Totals),
    Switchover(Package),
}

impl Destination {
    /// The contents of `run` are about to be read from `channel`; says where they go. An error is the source's fault.
    pub fn pages(&mut self, channel: Channel, run: PageRun) -> Result<Placement, String> {
        if !self.layout.holds(run) || run.count > MAX_RUN {
            return Err(format!("the source sent {run} of {}", self.layout.pages()));
        }
        let placement = self.placement(channel, run)?;
        match placement {
            Placement::Direct => {
                self.written.insert(run);
            }
            Placement::Fault if !self.layout.divides(run) => return Err(format!("the source sent {run}, a part of a host page")),
            Placement::Fault if channel == Channel::Urgent => {}
            _ => {
                self.incoming.comes_anyway(run);
                if self.incoming.receive_staged(run) {
                    return Ok(Placement::Staged);
                }
            }
        }
        Ok(placement)
    }

    /// The pages of `runs` are zero, the source says on `channel`. Returns which are to be made so: all by userfaultfd, or those that hold
    /// something else now. After the first, look for huge pages with [`Destination::take_gathered`]. An error is the source's fault.
    pub fn zero(&mut self, channel: Channel, runs: &[PageRun]) -> Result<(Placement, Vec<PageRun>), String> {
        if let Some(run) = runs.iter().find(|run| !self.layout.holds(**run) || channel == Channel::Urgent) {
            return Err(format!("the source sent zero {run} of {} on the {channel:?} connection", self.layout.pages()));
        }
        let &first = runs.first().ok_or("the source sent an empty list of zero pages")?;
        let placement = self.placement(channel, first)?;
        if placement == Placement::Fault {
            if let Some(run) = runs.iter().find(|run| !self.layout.divides(**run)) {
                return Err(format!("the source sent zero {run}, a part of a host page"));
            }
            runs.iter().for_each(|run| self.incoming.comes_anyway(*run));
            return Ok((placement, runs.iter().flat_map(|run| self.incoming.zero_staged(*run)).collect()));
        }
        let mut written = Vec::new();
        for &run in runs {
            written.extend(self.written.runs_within(run));
            self.written.remove(run);
        }
        Ok((placement, written))
    }

    /// What [`Destination::pages`] or [`Destination::zero`] has said is done: so many pages are in place that it wanted placed directly.
    pub fn received(&mut self, pages: Totals) {
        self.receiving = self.receiving.saturating_sub(1);
        let Totals { normal, zero } = &mut self.received;
        (*normal, *zero) = (normal.saturating_add(pages.normal), zero.saturating_add(pages.zero));
        self.check_ahead();
    }

    /// Whether contents were ever placed directly: if not, RAM is as it was allocated.
    pub fn has_received(&self) -> bool {
        self.received.normal > 0
    }

    fn placement(&mut self, channel: Channel, run: PageRun) -> Result<Placement, String> {
        match (self.state, channel) {
            (State::Receiving, Channel::Pages(_)) => {
                self.receiving += 1;
                Ok(Placement::Direct)
            }
            // Also before COMMIT has been read from the main connection, and on a link that was lost: no page changes any more.
            (
                State::Loading | State::Ready | State::Starting | State::Running | State::Whole | State::Ended,
                Channel::Urgent | Channel::Pages(_),
            ) if self.postcopy => Ok(Placement::Fault),
            (state, _) => Err(format!("the source sent {run} on the {channel:?} connection in state {state:?}")),
        }
    }

    /// Deals with what was said ahead of the pages if they are in place now. Fewer are on their way still; more cannot be.
    pub(super) fn check_ahead(&mut self) {
        // A reader may come to its end after the migration has come to its own.
        let (sent, received) = match &self.ahead {
            _ if self.state != State::Receiving => return,
            None => return,
            Some(Ahead::PassEnd(sent)) => (*sent, self.received),
            Some(Ahead::Switchover(package)) => (package.sent, self.received),
        };
        if received.normal > sent.normal || received.zero > sent.zero {
            return self.fail(&format!(
                "the source sent {} pages and {} zero pages, but {} and {} came",
                sent.normal, sent.zero, received.normal, received.zero
            ));
        }
        if received != sent || self.receiving > 0 {
            return;
        }
        match self.ahead.take() {
            Some(Ahead::Switchover(package)) => {
                if let Err(reason) = self.on_switchover(package) {
                    self.fail(&reason);
                }
            }
            _ => {
                self.actions.push_back(Action::FinishBuilding);
                self.send(Channel::Main, Frame::PassAck);
            }
        }
    }
}
