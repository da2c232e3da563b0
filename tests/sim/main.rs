//! The migration engine under simulation: both state machines over a simulated link, guest and disk, thousands of seeds, with connections
//! cut, either side killed and people interfering at every step. An oracle that sees both hosts checks the five rules.
//!
//! `FERRY_SIM_SEEDS=1000000 cargo test --release --test sim` soaks it; `FERRY_SIM_SEED=N` runs one seed and says what happened.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, reason = "a test may stop where it finds something wrong")]

mod link;
mod memory;
mod plan;
mod world;

use plan::{Fault, Plan};
use world::{Ending, World};

fn seeds(default: u64) -> std::ops::Range<u64> {
    if let Some(seed) = std::env::var("FERRY_SIM_SEED").ok().and_then(|text| text.parse().ok()) {
        return seed..seed + 1;
    }
    0..std::env::var("FERRY_SIM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Runs one seed, naming it if the oracle objects.
fn run(seed: u64, plan: &Plan) -> (Ending, World) {
    let mut world = World::new(seed, plan);
    match world.run() {
        Ok(ending) => (ending, world),
        Err(objection) => panic!("seed {seed}: {objection}\n{}", world.story()),
    }
}

#[test]
fn undisturbed_migrations_arrive_whole() {
    for seed in seeds(3000) {
        let (ending, world) = run(seed, &Plan::undisturbed(seed));
        assert_eq!(ending, Ending::Moved, "seed {seed}\n{}", world.story());
    }
}

#[test]
fn disturbed_at_any_step_nothing_runs_twice_and_nothing_is_lost_before_the_commit() {
    let mut endings = std::collections::BTreeMap::new();
    for seed in seeds(6000) {
        let plan = Plan::disturbed(seed);
        let (ending, mut world) = run(seed, &plan);
        *endings.entry(format!("{:?} -> {ending:?}", plan.fault_kind())).or_insert(0) += 1;
        if ending == Ending::Stayed {
            // A retry is as good as a first try.
            world.retry();
            match world.run() {
                Ok(Ending::Moved) => {}
                other => panic!("seed {seed}: the retry ended as {other:?}\n{}", world.story()),
            }
        }
    }
    println!("{endings:#?}");
    if seeds(0).is_empty() {
        // The disturbances reach before, into and behind the commit, or the test says nothing.
        for wanted in ["Stayed", "LostAfterCommit", "Moved"] {
            assert!(endings.keys().any(|ending| ending.ends_with(wanted)), "no migration ended as {wanted}: {endings:?}");
        }
    }
}

/// The oracle must object when the engine is wrong: here the link loses a frame silently, which TCP never does.
#[test]
fn the_oracle_objects_to_a_lost_frame() {
    let objections = (0..300)
        .filter(|seed| {
            let mut plan = Plan::undisturbed(*seed);
            plan.fault = Some((40 + seed % 200, Fault::LoseFrame));
            let mut world = World::new(*seed, &plan);
            !matches!(world.run(), Ok(Ending::Moved))
        })
        .count();
    assert!(objections > 100, "only {objections} of 300 lost frames were noticed");
}
