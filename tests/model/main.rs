//! The handover, exhaustively: both engines from the switch on, with every order of events that two hosts, two connections, a second one
//! that follows a lost one, the death of a side and the people at both can produce, within a budget of troubles.
//!
//! The driver's part (who holds the right to run, which connection is read by whom) is in `source` and `destination` of this directory; the
//! engines are the real ones. Found states are told as the list of steps that leads to them.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, reason = "a test may stop where it finds something wrong")]

mod destination;
mod engines;
mod explore;
mod source;
mod world;

use std::time::Instant;

use explore::{Graph, Violation};
use ferry::migrate::report::Mode;
use world::{Ending, Mutation, Right, State, Troubles, World};

const TWO_RUNNERS: &str = "the guest runs at the destination only when the source can run it no more";
const RESUMED: &str = "the source never runs the guest after it gave it up";
const INCOMPLETE: &str = "whoever calls the migration complete has a whole guest that runs at the destination";
const NO_END: &str = "a live pair gets to an end in which one side runs the whole guest and the other has ended";
const LOST: &str = "the guest is lost only with a side that is dead";

/// The property that `state` breaks by itself.
fn broken(state: &State) -> Option<&'static str> {
    let State { source, destination, .. } = state;
    if destination.right == Right::Running && !(source.committed && source.right == Right::None) {
        return Some(TWO_RUNNERS);
    }
    if source.committed && source.right != Right::None {
        return Some(RESUMED);
    }
    let called_complete = destination.complete || source.ending == Some(Ending::Moved);
    if called_complete && !(destination.is_whole() && destination.right == Right::Running) {
        return Some(INCOMPLETE);
    }
    None
}

/// Exactly one side runs the guest, whole, and the other has ended.
fn is_settled(State { source, destination, .. }: &State) -> bool {
    let moved = source.ending == Some(Ending::Moved) && destination.complete;
    let stayed = source.ending == Some(Ending::NotMoved) && source.right == Right::Running && destination.ending == Some(Ending::NotMoved);
    moved || stayed
}

/// Explores and checks everything; says how much there was.
fn check(mode: Mode, troubles: Troubles, mutation: Option<Mutation>) -> Result<(), Box<Violation>> {
    let began = Instant::now();
    let mut world = World::new(mutation);
    let begin = world.at_the_switch(mode, troubles.clone());
    let graph = Graph::explore(&mut world, begin, broken)?;
    let (sources, destinations) = world.engines.count();
    println!(
        "{mode:?}, {troubles:?}: {} states, {} transitions, {sources} source and {destinations} destination engines, {:.1} s",
        graph.states.len(),
        graph.transitions,
        began.elapsed().as_secs_f64(),
    );
    // As long as the person has not despaired.
    let is_live = |state: &State| state.source.alive && state.destination.alive && state.troubles.recoveries > 0;
    graph.require(NO_END, is_live, is_settled)?;
    // Before the commit the source needs nobody.
    graph.require(
        LOST,
        |state| state.source.alive && !state.source.committed,
        |state| state.source.right == Right::Running || is_settled(state),
    )?;
    // After it, a destination that was told so needs nobody but for what it lacks.
    let is_told = |state: &State| state.destination.alive && world.engines.destination(state.destination.engine).is_committed();
    graph.require(LOST, is_told, |state| state.destination.right == Right::Running)?;
    graph.require(LOST, |state| is_told(state) && state.destination.is_whole(), |state| state.destination.complete)
}

fn holds(mode: Mode, troubles: Troubles) {
    if let Err(violation) = check(mode, troubles, None) {
        panic!("broken: {}\n{:?}\n{:?}", violation.property, violation.story, violation.state);
    }
}

const NONE: Troubles = Troubles { losses: 0, deaths: 0, echoes: 0, timeouts: 0, cancels: 0, stops: 0, recoveries: 3 };

#[test]
fn one_trouble_of_each_kind() {
    for mode in [Mode::Precopy, Mode::Postcopy] {
        holds(mode, Troubles { losses: 1, ..NONE });
        holds(mode, Troubles { deaths: 1, ..NONE });
        holds(mode, Troubles { echoes: 1, ..NONE });
        holds(mode, Troubles { timeouts: 1, ..NONE });
        holds(mode, Troubles { cancels: 1, stops: 1, ..NONE });
    }
}

#[test]
fn troubles_together_before_and_after_a_precopy() {
    holds(Mode::Precopy, Troubles { losses: 1, deaths: 1, echoes: 1, ..NONE });
    holds(Mode::Precopy, Troubles { losses: 2, deaths: 1, cancels: 1, ..NONE });
}

#[test]
fn troubles_together_in_postcopy() {
    holds(Mode::Postcopy, Troubles { losses: 1, stops: 1, ..NONE });
    holds(Mode::Postcopy, Troubles { losses: 1, deaths: 1, cancels: 1, ..NONE });
    holds(Mode::Postcopy, Troubles { losses: 2, ..NONE });
}

/// What does not notice a wrong engine or driver says nothing about right ones.
#[test]
fn wrong_engines_and_drivers_are_noticed() {
    let troubles = Troubles { losses: 1, deaths: 1, ..NONE };
    for (mutation, property) in [
        (Mutation::SourceResumesAfterCommit, RESUMED),
        (Mutation::DestinationRunsAtReady, TWO_RUNNERS),
        (Mutation::SourceForgetsToResume, NO_END),
        (Mutation::DestinationRefusesReturn, NO_END),
        (Mutation::SourceTakesLossForSuccess, INCOMPLETE),
    ] {
        match check(Mode::Precopy, troubles.clone(), Some(mutation)) {
            Err(violation) => assert_eq!(violation.property, property, "{mutation:?}"),
            Ok(()) => panic!("{mutation:?} was not noticed"),
        }
    }
}
