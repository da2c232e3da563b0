//! The destination's driver in the model: who accepts connections, the main thread, the urgent one, and the guest.

use ferry::memory::{PageNumber, PageRun};
use ferry::migrate::destination::{Action, Outcome, Poll};
use ferry::migrate::wire::{Channel, Frame};

use crate::engines::{Answer, Id, PAGES, ToDestination};
use crate::world::{Accepted, Ending, Mutation, Right, State, Step, Task, World};

impl World {
    fn ask_destination(&mut self, state: &mut State, call: ToDestination) -> Answer {
        let (engine, answer) = self.engines.call_destination(state.destination.engine, call);
        state.destination.engine = engine;
        answer
    }

    /// Tells the engine something to which it does not answer.
    pub fn tell_destination(&mut self, state: &mut State, call: ToDestination) {
        self.ask_destination(state, call);
    }

    pub fn destination_steps(&mut self, state: &State, steps: &mut Vec<(Step, bool)>) {
        let destination = &state.destination;
        if !destination.alive || destination.ending.is_some() {
            return;
        }
        let is_idle = matches!(self.engines.call_destination(destination.engine, ToDestination::Poll).1, Answer::Poll(Poll::Wait(_)));
        match destination.task {
            Some(Task::Load) => steps.extend([(Step::DestinationFinishesTask, true), (Step::DestinationCannotLoad, false)]),
            Some(_) => steps.push((Step::DestinationFinishesTask, true)),
            None if !is_idle => steps.push((Step::DestinationPolls, true)),
            None => {}
        }
        for (index, connection) in state.connections.iter().enumerate() {
            let is_heard = match (connection.destination, connection.channel) {
                (Accepted::Unread, _) | (Accepted::Held(_), Channel::Urgent | Channel::Pages(_)) => true,
                // The main thread reads when it has nothing else to do.
                (Accepted::Held(link), Channel::Main) => link == destination.link && destination.task.is_none() && is_idle,
                (Accepted::Waiting(_) | Accepted::Closed, _) => false,
            };
            if !is_heard {
                continue;
            }
            let is_empty = connection.to_destination.is_empty();
            if !is_empty {
                steps.push((Step::DestinationReads(index), true));
            }
            if connection.is_cut() {
                steps.push((Step::DestinationReadsEnd(index), is_empty));
            }
        }
        let engine = self.engines.destination(destination.engine);
        if destination.right == Right::Running && engine.missing().contains(PageNumber(0)) && engine.waiting().is_empty() {
            steps.push((Step::GuestTouchesMissingPage, true));
        }
        let source_is_out = !state.source.alive || state.source.ending == Some(Ending::NotMoved);
        if engine.is_paused() && !engine.is_committed() && source_is_out {
            steps.push((Step::StopWaiting, true));
        }
        if !engine.is_paused() && !engine.is_committed() && state.troubles.stops > 0 {
            steps.push((Step::StopDestination, false));
        }
        if !engine.is_paused() && state.troubles.losses > 0 {
            steps.push((Step::PauseDestination, false));
        }
    }

    pub fn destination_reads(&mut self, state: &mut State, index: usize) {
        let connection = &mut state.connections[index];
        let (channel, accepted) = (connection.channel, connection.destination);
        let Some(id) = connection.to_destination.pop_front() else { return };
        match (accepted, self.engines.frame(id).clone()) {
            (Accepted::Held(_), Frame::Pages(run)) => self.destination_receives(state, index, ToDestination::Pages(channel, run), run),
            (Accepted::Held(_), Frame::Zero(runs)) => {
                for run in runs {
                    self.destination_receives(state, index, ToDestination::Zero(channel, run), run);
                }
            }
            (Accepted::Held(link), _) => {
                self.tell_destination(state, ToDestination::Frame(link, channel, id));
            }
            (_, Frame::Hello(hello)) => self.destination_greets(state, index, hello.link, hello.channel),
            (accepted, frame) => panic!("{frame:?} on a connection that is {accepted:?}"),
        }
    }

    fn destination_receives(&mut self, state: &mut State, index: usize, call: ToDestination, run: PageRun) {
        match self.ask_destination(state, call) {
            Answer::Refused => state.connections[index].destination = Accepted::Closed,
            _ => state.destination.pages |= bits(run),
        }
    }

    pub fn destination_reads_end(&mut self, state: &mut State, index: usize) {
        let connection = &mut state.connections[index];
        let (channel, accepted) = (connection.channel, connection.destination);
        connection.destination = Accepted::Closed;
        if let Accepted::Held(link) = accepted {
            self.tell_destination(state, ToDestination::Lost(link, channel));
        }
    }

    fn destination_greets(&mut self, state: &mut State, index: usize, link: u32, channel: Channel) {
        let returns = channel == Channel::Main && state.destination.right != Right::None;
        let refuses = returns && self.mutation == Some(Mutation::DestinationRefusesReturn);
        let answer = if refuses { Answer::Refused } else { self.ask_destination(state, ToDestination::Hello(link, channel)) };
        let Answer::Accepted(link) = answer else {
            let abort = self.engines.frame_id(Frame::Abort(String::new()));
            let connection = &mut state.connections[index];
            if !connection.is_cut() {
                connection.to_source.push_back(abort);
            }
            connection.destination = Accepted::Closed;
            return;
        };
        if channel != Channel::Main {
            state.connections[index].destination = Accepted::Held(link);
            if channel == Channel::Urgent && state.destination.right != Right::None {
                self.destination_asks(state, ToDestination::Renew);
            }
            return;
        }
        // Whatever was there before is interrupted, and heard no more.
        state.close_destination(|accepted| matches!(accepted, Accepted::Waiting(_) | Accepted::Held(_)));
        // The first one is its own thread's.
        state.connections[index].destination = if link == 0 { Accepted::Held(0) } else { Accepted::Waiting(link) };
    }

    /// Sends what the engine wants to be asked for, if there is a connection for it.
    pub fn destination_asks(&mut self, state: &mut State, call: ToDestination) {
        if let Answer::Ask(runs) = self.ask_destination(state, call) {
            let ids: Vec<Id> = runs.into_iter().map(|run| self.engines.frame_id(Frame::Request(run))).collect();
            let held = |accepted| matches!(accepted, Accepted::Held(_));
            send(state, Channel::Urgent, held, &ids);
        }
    }

    pub fn destination_polls(&mut self, state: &mut State) {
        if let Answer::Poll(Poll::Act(action)) = self.ask_destination(state, ToDestination::Poll) {
            self.destination_acts(state, action);
        }
    }

    fn destination_acts(&mut self, state: &mut State, action: Action) {
        let host = &mut state.destination;
        match action {
            Action::Send(channel, frame) => {
                if self.mutation == Some(Mutation::DestinationRunsAtReady) && matches!(frame, Frame::Ready { .. }) {
                    host.right = Right::Running;
                }
                let link = host.link;
                let id = self.engines.frame_id(frame);
                send(state, channel, |accepted| accepted == Accepted::Held(link), &[id]);
            }
            Action::Prepare(_) => host.task = Some(Task::Prepare),
            Action::BeginBuilding | Action::FinishBuilding => {}
            Action::Load(package) => {
                host.task = Some(Task::Load);
                host.pages = package.missing.iter().fold((1 << PAGES) - 1, |pages, run| pages & !bits(*run));
            }
            Action::Run => host.task = Some(Task::Run),
            Action::LoadBitmap { run, .. } => host.bitmap_words += run.count(),
            Action::CompleteBitmap(_) => host.bitmap_complete = true,
            // Nobody asks for it here, and no disk is copied.
            Action::AbandonBitmaps | Action::FlushDisks => {}
            Action::Disconnect(_) => {
                let link = host.link;
                state.close_destination(|accepted| accepted == Accepted::Held(link));
            }
            Action::Reconnect(link) => {
                let link = link.0;
                if let Some(connection) = state.connections.iter_mut().find(|connection| connection.destination == Accepted::Waiting(link))
                {
                    connection.destination = Accepted::Held(link);
                    host.link = link;
                }
            }
            Action::Complete => host.complete = true,
            Action::End(outcome) => {
                host.ending = Some(if outcome == Outcome::Completed { Ending::Moved } else { Ending::NotMoved });
                if outcome != Outcome::Completed {
                    host.right = Right::None;
                }
                state.close_destination(|_| true);
            }
        }
    }

    pub fn destination_finishes(&mut self, state: &mut State) {
        let call = match state.destination.task.take() {
            None => return,
            Some(Task::Prepare) => ToDestination::Prepared,
            Some(Task::Load) => {
                state.destination.right = Right::Paused;
                ToDestination::Loaded
            }
            Some(Task::Run) => {
                state.destination.right = Right::Running;
                ToDestination::Ran
            }
        };
        self.tell_destination(state, call);
    }
}

fn bits(run: PageRun) -> u64 {
    run.pages().fold(0, |bits, page| bits | 1 << page.0)
}

/// Sends on the connection whose end at the destination is `such`, if it stands.
fn send(state: &mut State, channel: Channel, such: impl Fn(Accepted) -> bool, frames: &[Id]) {
    let ours = state.connections.iter_mut().find(|connection| connection.channel == channel && such(connection.destination));
    if let Some(connection) = ours
        && !connection.is_cut()
    {
        connection.to_source.extend(frames);
    }
}
