//! The migration engine under simulation: both state machines over a simulated link, guest and disk, thousands of seeds, with connections
//! cut, either side killed and people interfering at every step. An oracle that sees both hosts checks the five rules.
//!
//! `FERRY_SIM_SEEDS=1000000 cargo test --release --test sim` soaks it; `FERRY_SIM_SEED=N` runs one seed and says what happened.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, reason = "a test may stop where it finds something wrong")]

mod link;
mod machine;
mod memory;
mod plan;
mod world;

use std::collections::BTreeMap;

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

/// What is part of some undisturbed migrations.
const COURSES: [&str; 5] =
    ["source: Throttle", "source: Resume", "person: continue", "guest: waits for a block", "guest: writes a block that has not come"];

#[test]
fn undisturbed_migrations_arrive_whole() {
    let mut courses = BTreeMap::new();
    for seed in seeds(3000) {
        let (ending, world) = run(seed, &Plan::undisturbed(seed));
        assert_eq!(ending, Ending::Moved, "seed {seed}\n{}", world.story());
        for course in COURSES {
            *courses.entry(course.to_string()).or_insert(0) += u64::from(world.had(course));
        }
    }
    println!("{courses:#?}");
    courses.retain(|_, count| *count > 0);
    reached(&courses, &COURSES);
}

/// Runs one seed; where the guest stayed, a retry must arrive: it is as good as a first try.
fn run_and_retry(seed: u64, plan: &Plan) -> (Ending, u32) {
    let (ending, mut world) = run(seed, plan);
    let recoveries = world.recoveries();
    if matches!(ending, Ending::Stayed | Ending::StayedPaused) {
        world.retry();
        match world.run() {
            Ok(Ending::Moved) => {}
            other => panic!("seed {seed}: the retry ended as {other:?}\n{}", world.story()),
        }
    }
    (ending, recoveries)
}

#[test]
fn disturbed_at_any_step_nothing_runs_twice_and_nothing_is_lost_before_the_commit() {
    let mut endings = BTreeMap::new();
    for seed in seeds(6000) {
        let plan = Plan::disturbed(seed);
        let (ending, _) = run_and_retry(seed, &plan);
        *endings.entry(format!("{:?} -> {ending:?}", plan.faults[0].1)).or_insert(0) += 1;
    }
    println!("{endings:#?}");
    // The disturbances reach before, into and behind the commit, or the test says nothing.
    let ends = ["GuestEnds -> GuestEnded", "GuestEnds -> Moved", "StayedPaused", "FreezeSource -> Moved", "FreezeDestination -> Stayed"];
    reached(&endings, &["Stayed", "LostAfterCommit", "Moved"]);
    reached(&endings, &ends);
}

#[test]
fn a_wait_before_the_switch_ends_as_the_person_wants_or_with_a_guest_that_goes_on() {
    let mut endings = BTreeMap::new();
    for seed in seeds(3000) {
        let plan = Plan::waiting(seed);
        let (ending, _) = run_and_retry(seed, &plan);
        let disturbed = if plan.faults.is_empty() { "undisturbed" } else { "disturbed" };
        *endings.entry(format!("{disturbed} -> {ending:?}")).or_insert(0) += 1;
    }
    println!("{endings:#?}");
    reached(&endings, &["undisturbed -> Moved", "undisturbed -> Stayed", "disturbed -> Moved", "disturbed -> Stayed", "GuestEnded"]);
}

#[test]
fn a_dry_run_moves_nothing_and_a_migration_may_follow() {
    let mut endings = BTreeMap::new();
    for seed in seeds(1000) {
        let plan = Plan::dry_run(seed);
        let (ending, mut world) = run(seed, &plan);
        assert!(!plan.faults.is_empty() || ending == Ending::Stayed, "seed {seed}: {ending:?}\n{}", world.story());
        let moved = ["source: GiveUp", "source: Stop", "destination: Load", "destination: Run"];
        assert!(moved.iter().all(|step| !world.had(step)), "seed {seed}: a dry run went on\n{}", world.story());
        if ending == Ending::Stayed {
            world.retry();
            assert_eq!(world.run(), Ok(Ending::Moved), "seed {seed}\n{}", world.story());
        }
        *endings.entry(format!("{ending:?}")).or_insert(0) += 1;
    }
    println!("{endings:#?}");
    reached(&endings, &["Stayed", "GuestEnded", "DiedWithSource"]);
}

#[test]
fn links_that_are_lost_again_and_again_lose_nothing_while_both_sides_live() {
    let mut endings = BTreeMap::new();
    for seed in seeds(6000) {
        let plan = Plan::losses(seed);
        let (ending, recoveries) = run_and_retry(seed, &plan);
        assert!(matches!(ending, Ending::Moved | Ending::Stayed), "seed {seed}: {ending:?}");
        *endings.entry(format!("{recoveries} recoveries -> {ending:?}")).or_insert(0) += 1;
    }
    println!("{endings:#?}");
    reached(&endings, &["Stayed", "1 recoveries -> Moved", "4 recoveries -> Moved"]);
}

#[test]
fn a_death_after_lost_links_takes_no_more_than_it_must() {
    let mut endings = BTreeMap::new();
    for seed in seeds(6000) {
        let (ending, _) = run_and_retry(seed, &Plan::deadly(seed));
        *endings.entry(format!("{ending:?}")).or_insert(0) += 1;
    }
    println!("{endings:#?}");
    reached(&endings, &["Stayed", "LostAfterCommit", "Moved", "MovedWithoutBitmaps", "DiedWithSource"]);
}

/// Every one of `wanted` has come about, unless few seeds are run.
fn reached(endings: &BTreeMap<String, u64>, wanted: &[&str]) {
    for wanted in wanted.iter().filter(|_| seeds(3000).end - seeds(3000).start >= 3000) {
        assert!(endings.keys().any(|ending| ending.ends_with(wanted)), "no migration ended as {wanted}: {endings:?}");
    }
}

/// The oracle must object when the engine is wrong: here the link loses a frame silently, which TCP never does.
#[test]
fn the_oracle_objects_to_a_lost_frame() {
    let objections = (0..300)
        .filter(|seed| {
            let mut plan = Plan::undisturbed(*seed);
            plan.faults = vec![(40 + seed % 200, Fault::LoseFrame)];
            let mut world = World::new(*seed, &plan);
            !matches!(world.run(), Ok(Ending::Moved))
        })
        .count();
    assert!(objections > 100, "only {objections} of 300 lost frames were noticed");
}
