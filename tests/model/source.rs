//! The source's driver in the model: its main thread, its readers, and the person at the source.

use ferry::block::dirty_bitmap::BitmapRun;
use ferry::memory::PageRun;
use ferry::migrate::source::{Action, Bulk, Outcome, Poll};
use ferry::migrate::wire::{Channel, Frame};

use crate::engines::{Id, PAGES, PAGES_CHANNEL, Said, ToSource};
use crate::world::{Connection, Ending, Mutation, Right, State, Step, World, opened};

impl World {
    /// Tells the engine something to which it does not answer.
    pub fn tell_source(&mut self, state: &mut State, call: ToSource) {
        state.source.engine = self.engines.call_source(state.source.engine, call).0;
    }

    pub fn source_steps(&mut self, state: &State, steps: &mut Vec<(Step, bool)>) {
        let source = &state.source;
        if !source.alive || source.ending.is_some() {
            return;
        }
        if source.giving_up {
            // It may have come to nothing for any reason, such as a disk.
            steps.extend([(Step::SourceGivesUp, true), (Step::SourceCannotGiveUp, true)]);
        } else if !matches!(self.engines.call_source(source.engine, ToSource::Poll).1, Said::Poll(Poll::Wait(_))) {
            steps.push((Step::SourcePolls, true));
        }
        // The main thread hears its readers only between two polls.
        let heard = |(_, connection): &(usize, &Connection)| connection.source && !source.giving_up;
        for (index, connection) in state.connections.iter().enumerate().filter(heard) {
            let is_empty = connection.to_source.is_empty();
            if !is_empty {
                steps.push((Step::SourceReads(index), true));
            }
            if connection.is_cut() {
                steps.push((Step::SourceReadsEnd(index), is_empty));
            }
        }
        let engine = self.engines.source(source.engine);
        if engine.waits_before_switchover() {
            steps.push((Step::Continue, true));
        }
        if engine.is_paused() && state.troubles.recoveries > 0 {
            steps.push((Step::Recover, true));
        }
        if engine.is_committed() && !engine.is_paused() && !engine.is_over() && state.troubles.losses > 0 {
            steps.push((Step::PauseSource, false));
        }
        if !engine.is_committed() && state.troubles.cancels > 0 {
            steps.push((Step::Cancel, false));
        }
    }

    pub fn source_waits_for_deadline(&mut self, state: &State) -> bool {
        let source = &state.source;
        source.alive
            && source.ending.is_none()
            && !source.giving_up
            && matches!(self.engines.call_source(source.engine, ToSource::Poll).1, Said::Poll(Poll::Wait(Some(_))))
    }

    pub fn source_polls(&mut self, state: &mut State) {
        self.source_does(state, ToSource::Poll);
    }

    pub fn source_polls_late(&mut self, state: &mut State) {
        self.source_does(state, ToSource::PollLate);
    }

    fn source_does(&mut self, state: &mut State, poll: ToSource) {
        let (engine, said) = self.engines.call_source(state.source.engine, poll);
        state.source.engine = engine;
        match said {
            Said::Poll(Poll::Act(action)) => self.source_acts(state, action),
            Said::Poll(Poll::Bulk(Bulk::Pages { runs, .. })) => self.source_sends_pages(state, &runs),
            Said::Poll(Poll::Bulk(Bulk::Bitmap { index, first, .. })) => {
                self.send_to_destination(state, Channel::Main, Frame::Bitmap { index, first, run: BitmapRun::Words(vec![1]) });
                self.tell_source(state, ToSource::SentBitmap);
            }
            Said::Poll(Poll::Wait(_)) | Said::Nothing | Said::Refused => {}
        }
    }

    fn source_acts(&mut self, state: &mut State, action: Action) {
        match action {
            Action::Send(frame) => self.send_to_destination(state, Channel::Main, frame),
            // A main connection that is open is the one whose first frame comes next, as a send.
            Action::Connect if state.is_listening() => state.connections.push(opened(Channel::Main, [])),
            Action::Connect => self.tell_source(state, ToSource::ConnectFailed),
            Action::OpenOthers if state.is_listening() => {
                let link = self.engines.source(state.source.engine).link();
                for channel in [Channel::Urgent, PAGES_CHANNEL] {
                    let hello = self.engines.hello_id(link, channel);
                    state.connections.push(opened(channel, [hello]));
                }
            }
            Action::OpenOthers => self.tell_source(state, ToSource::ConnectFailed),
            Action::Disconnect(_) => {
                state.close_source();
                match self.mutation {
                    Some(Mutation::SourceResumesAfterCommit) => state.source.right = Right::Running,
                    Some(Mutation::SourceTakesLossForSuccess) => state.source.ending = Some(Ending::Moved),
                    _ => {}
                }
            }
            Action::StartTracking => self.tell_source(state, ToSource::Harvested { first: true }),
            Action::Harvest => self.tell_source(state, ToSource::Harvested { first: false }),
            Action::Stop => {
                state.source.right = Right::Paused;
                self.tell_source(state, ToSource::Stopped);
            }
            Action::Resume if self.mutation == Some(Mutation::SourceForgetsToResume) => {}
            Action::Resume => state.source.right = Right::Running,
            Action::GiveUp => state.source.giving_up = true,
            Action::Throttle(_) => {}
            Action::Watch => panic!("a dry run was not asked for"),
            Action::End(outcome) => self.source_ends(state, &outcome),
        }
    }

    fn source_ends(&mut self, state: &mut State, outcome: &Outcome) {
        state.close_source();
        state.source.ending = Some(match outcome {
            Outcome::Completed(_) => Ending::Moved,
            Outcome::NotMoved(_) => Ending::NotMoved,
        });
        if self.engines.source(state.source.engine).may_be_waited_for() && state.is_listening() {
            // The destination is told on a new connection, in case it did not hear it on the old one.
            let link = self.engines.source(state.source.engine).link() + 1;
            let words = [self.engines.hello_id(link, Channel::Main), self.engines.frame_id(Frame::Abort(String::new()))];
            state.connections.push(opened(Channel::Main, words));
            state.close_source();
        }
    }

    fn source_sends_pages(&mut self, state: &mut State, runs: &[PageRun]) {
        let (mut normal, mut zero) = (0, 0);
        for page in runs.iter().flat_map(|run| run.pages()) {
            let single = PageRun::single(page);
            let is_zero = page.0 == PAGES - 1;
            *(if is_zero { &mut zero } else { &mut normal }) += 1;
            let frame = if is_zero { Frame::Zero(vec![single]) } else { Frame::Pages(single) };
            self.send_to_destination(state, PAGES_CHANNEL, frame);
        }
        if state.source.committed {
            // Nobody compares any more what was sent.
            (normal, zero) = (0, 0);
        }
        self.tell_source(state, ToSource::Sent { normal, zero });
    }

    pub fn source_reads(&mut self, state: &mut State, index: usize) {
        let connection = &mut state.connections[index];
        let channel = connection.channel;
        let Some(id) = connection.to_source.pop_front() else { return };
        match channel {
            Channel::Main => self.tell_source(state, ToSource::Frame(id)),
            Channel::Urgent => self.source_is_asked(state, index, id),
            // It is refused.
            Channel::Pages(_) => {
                state.connections[index].source = false;
                self.tell_source(state, ToSource::Lost(channel));
            }
        }
    }

    fn source_is_asked(&mut self, state: &mut State, index: usize, id: Id) {
        if let Frame::Request(run) = *self.engines.frame(id) {
            let (engine, said) = self.engines.call_source(state.source.engine, ToSource::Request(run));
            state.source.engine = engine;
            match said {
                Said::Refused => state.connections[index].source = false,
                _ => self.send_to_destination(state, Channel::Urgent, Frame::Pages(run)),
            }
        } else {
            // Nothing but requests is understood here.
            state.connections[index].source = false;
            self.tell_source(state, ToSource::Lost(Channel::Urgent));
        }
    }
}
