//! The two hosts, their connections and who may run the guest: one state of the model, and what can happen in it.

use std::collections::VecDeque;

use ferry::memory::PageNumber;
use ferry::migrate::report::Mode;
use ferry::migrate::wire::{Channel, Frame};

use crate::engines::{Engines, Id, PAGES, PAGES_CHANNEL, ToDestination, ToSource};

/// What a host may do with the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Right {
    /// None, not yet or no longer.
    None,
    Paused,
    Running,
}

/// How a side has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    Moved,
    NotMoved,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceHost {
    pub alive: bool,
    pub engine: Id,
    pub right: Right,
    /// Between `GiveUp` and its success or failure: the disks are being flushed.
    pub giving_up: bool,
    /// The right was given up.
    pub committed: bool,
    pub ending: Option<Ending>,
}

/// What the destination's main thread is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    Prepare,
    Load,
    Run,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationHost {
    pub alive: bool,
    pub engine: Id,
    pub right: Right,
    /// The link whose main connection the main thread uses, or used last.
    pub link: u32,
    pub task: Option<Task>,
    /// One bit for each page whose last version is here, from the load on.
    pub pages: u64,
    pub bitmap_words: u64,
    pub bitmap_complete: bool,
    /// The owner was told that the guest is whole.
    pub complete: bool,
    pub ending: Option<Ending>,
}

impl DestinationHost {
    pub fn is_whole(&self) -> bool {
        self.pages == (1 << PAGES) - 1 && self.bitmap_words == 1 && self.bitmap_complete
    }
}

/// The destination's end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accepted {
    /// Nothing has been read of it.
    Unread,
    /// A main connection that is this link's, and not yet in the hands of the main thread.
    Waiting(u32),
    Held(u32),
    Closed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Connection {
    pub channel: Channel,
    pub to_destination: VecDeque<Id>,
    pub to_source: VecDeque<Id>,
    pub lost: bool,
    /// The source's end is open.
    pub source: bool,
    pub destination: Accepted,
}

impl Connection {
    /// Nothing more can be sent; each reader finds that out in its own time, having read some, all or none of what is under way.
    pub fn is_cut(&self) -> bool {
        self.lost || !self.source || self.destination == Accepted::Closed
    }
}

/// What may still go wrong.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Troubles {
    /// Connections lost, or broken by a person.
    pub losses: u8,
    pub deaths: u8,
    /// Connections that seem to come from the source and are an echo of an old one.
    pub echoes: u8,
    /// Deadlines that expire though the answer was on its way.
    pub timeouts: u8,
    pub cancels: u8,
    /// A person at the destination gives up while the link stands.
    pub stops: u8,
    /// How often a person joins the two again. Each new link can be broken by what is left of the one before, as often as the network
    /// holds that back, so that without a bound there would be no end to the states.
    pub recoveries: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub source: SourceHost,
    pub destination: DestinationHost,
    /// In the order in which they were opened; those closed at both ends are forgotten.
    pub connections: Vec<Connection>,
    pub troubles: Troubles,
}

/// Something that happens. Connections are named by their place in [`State::connections`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    SourcePolls,
    SourceGivesUp,
    SourceCannotGiveUp,
    SourceReads(usize),
    /// The end of the connection; what was under way is gone.
    SourceReadsEnd(usize),
    SourceTimesOut,
    DestinationPolls,
    DestinationFinishesTask,
    DestinationCannotLoad,
    DestinationReads(usize),
    DestinationReadsEnd(usize),
    GuestTouchesMissingPage,
    /// A person at the source ends the wait before the switch.
    Continue,
    /// A person asks for recovery at the source.
    Recover,
    /// A person who sees that the source is dead, or runs the guest, ends a destination that waits.
    StopWaiting,
    LoseConnection(usize),
    EchoHello(Channel),
    PauseSource,
    PauseDestination,
    Cancel,
    StopDestination,
    KillSource,
    KillDestination,
}

/// An engine or a driver made wrong, to see whether the properties notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// The source lets the guest go on when the link is lost after the commit.
    SourceResumesAfterCommit,
    DestinationRunsAtReady,
    /// A guest that could not be handed over stays paused.
    SourceForgetsToResume,
    /// A source that comes back is not let in.
    DestinationRefusesReturn,
    /// The end of the connection counts as the end of the migration.
    SourceTakesLossForSuccess,
}

pub struct World {
    pub engines: Engines,
    pub mutation: Option<Mutation>,
}

impl World {
    pub fn new(mutation: Option<Mutation>) -> Self {
        World { engines: Engines::new(), mutation }
    }

    /// The moment at which the guest stands still at the source, before the package is sent. Up to there everything goes its usual way.
    pub fn at_the_switch(&mut self, mode: Mode, troubles: Troubles) -> State {
        let (source, destination) = self.engines.begin(mode);
        let mut state = State {
            source: SourceHost { alive: true, engine: source, right: Right::Running, giving_up: false, committed: false, ending: None },
            destination: DestinationHost {
                alive: true,
                engine: destination,
                right: Right::None,
                link: 0,
                task: None,
                pages: 0,
                bitmap_words: 0,
                bitmap_complete: false,
                complete: false,
                ending: None,
            },
            connections: Vec::new(),
            troubles: Troubles { losses: 0, deaths: 0, echoes: 0, timeouts: 0, cancels: 0, stops: 0, recoveries: 0 },
        };
        while state.source.right == Right::Running {
            let step = self.steps(&state).into_iter().next().expect("the migration does not come to the switch");
            self.take(&mut state, step.0);
        }
        State { troubles, ..state }
    }

    /// Everything that can happen in `state`; true where it is no trouble but the usual course of things, persons who help included.
    pub fn steps(&mut self, state: &State) -> Vec<(Step, bool)> {
        let mut steps = Vec::new();
        self.source_steps(state, &mut steps);
        self.destination_steps(state, &mut steps);
        // Time passes when nothing else happens.
        let waits = self.source_waits_for_deadline(state);
        if waits && !steps.iter().any(|(_, usual)| *usual) {
            steps.push((Step::SourceTimesOut, true));
        } else if waits && state.troubles.timeouts > 0 {
            steps.push((Step::SourceTimesOut, false));
        }
        let Troubles { losses, deaths, echoes, .. } = state.troubles;
        if losses > 0 {
            let standing = |(_, connection): &(usize, &Connection)| !connection.is_cut();
            steps.extend(state.connections.iter().enumerate().filter(standing).map(|(index, _)| (Step::LoseConnection(index), false)));
        }
        if echoes > 0 && state.destination.alive && state.destination.ending.is_none() {
            steps.extend([Channel::Main, Channel::Urgent, PAGES_CHANNEL].map(|channel| (Step::EchoHello(channel), false)));
        }
        if deaths > 0 && state.source.alive && state.destination.alive {
            steps.extend([(Step::KillSource, false), (Step::KillDestination, false)]);
        }
        steps
    }

    /// Changes `state` as `step` says.
    pub fn take(&mut self, state: &mut State, step: Step) {
        match step {
            Step::SourcePolls => self.source_polls(state),
            Step::SourceGivesUp => {
                state.source.giving_up = false;
                state.source.committed = true;
                state.source.right = Right::None;
            }
            Step::SourceCannotGiveUp => {
                state.source.giving_up = false;
                self.tell_source(state, ToSource::GiveUpFailed);
            }
            Step::SourceReads(index) => self.source_reads(state, index),
            Step::SourceReadsEnd(index) => {
                let channel = state.connections[index].channel;
                state.connections[index].source = false;
                self.tell_source(state, ToSource::Lost(channel));
            }
            Step::SourceTimesOut => {
                state.troubles.timeouts = state.troubles.timeouts.saturating_sub(1);
                self.source_polls_late(state);
            }
            Step::DestinationPolls => self.destination_polls(state),
            Step::DestinationFinishesTask => self.destination_finishes(state),
            Step::DestinationCannotLoad => {
                state.destination.task = None;
                self.tell_destination(state, ToDestination::LoadFailed);
            }
            Step::DestinationReads(index) => self.destination_reads(state, index),
            Step::DestinationReadsEnd(index) => self.destination_reads_end(state, index),
            Step::GuestTouchesMissingPage => self.destination_asks(state, ToDestination::Fault(PageNumber(0))),
            Step::Continue => self.tell_source(state, ToSource::Continue),
            Step::Recover => {
                state.troubles.recoveries -= 1;
                self.tell_source(state, ToSource::Recover);
            }
            Step::StopWaiting => self.tell_destination(state, ToDestination::GiveUp),
            Step::LoseConnection(index) => {
                state.troubles.losses -= 1;
                state.connections[index].lost = true;
            }
            Step::EchoHello(channel) => {
                state.troubles.echoes -= 1;
                let link = self.engines.source(state.source.engine).link();
                let hello = self.engines.hello_id(link, channel);
                state.connections.push(Connection { source: false, ..opened(channel, [hello]) });
            }
            Step::PauseSource => {
                state.troubles.losses -= 1;
                self.tell_source(state, ToSource::Pause);
            }
            Step::PauseDestination => {
                state.troubles.losses -= 1;
                self.tell_destination(state, ToDestination::Pause);
            }
            Step::Cancel => {
                state.troubles.cancels -= 1;
                self.tell_source(state, ToSource::Cancel);
            }
            Step::StopDestination => {
                state.troubles.stops -= 1;
                self.tell_destination(state, ToDestination::GiveUp);
            }
            Step::KillSource => {
                state.troubles.deaths -= 1;
                state.source.alive = false;
                state.close_source();
            }
            Step::KillDestination => {
                state.troubles.deaths -= 1;
                state.destination.alive = false;
                state.close_destination(|_| true);
            }
        }
        // What nobody can ever notice is no part of the state.
        for connection in &mut state.connections {
            if !connection.source {
                connection.to_source.clear();
            }
            if connection.destination == Accepted::Closed {
                connection.to_destination.clear();
            }
        }
        state.connections.retain(|connection| connection.source || connection.destination != Accepted::Closed);
    }

    pub fn send_to_destination(&mut self, state: &mut State, channel: Channel, frame: Frame) {
        let id = self.engines.frame_id(frame);
        let ours = |connection: &&mut Connection| connection.channel == channel && connection.source && !connection.is_cut();
        if let Some(connection) = state.connections.iter_mut().find(ours) {
            connection.to_destination.push_back(id);
        }
    }
}

impl State {
    pub fn close_source(&mut self) {
        self.connections.iter_mut().for_each(|connection| connection.source = false);
    }

    /// Closes the destination's ends that are `such`.
    pub fn close_destination(&mut self, such: impl Fn(Accepted) -> bool) {
        for connection in self.connections.iter_mut().filter(|connection| such(connection.destination)) {
            connection.destination = Accepted::Closed;
        }
    }

    /// Whether a connection to the destination would be accepted.
    pub fn is_listening(&self) -> bool {
        self.destination.alive && self.destination.ending.is_none()
    }
}

/// A connection just opened by the source, with its first frames.
pub fn opened(channel: Channel, frames: impl Into<VecDeque<Id>>) -> Connection {
    let (to_destination, to_source) = (frames.into(), VecDeque::new());
    Connection { channel, to_destination, to_source, lost: false, source: true, destination: Accepted::Unread }
}
