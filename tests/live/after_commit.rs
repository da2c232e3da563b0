//! What goes wrong after the commit: the source never runs the guest again, and the destination runs on with what it has.

use std::time::{Duration, Instant};

use serde_json::json;

use super::ferry::{Ferry, wait_for_migration, wait_until};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::migration::Migration;
use super::output::More;
use super::process::End;

/// Far too slow for the pages ever to arrive by themselves.
pub const TRICKLE: [&str; 4] = ["--mode", "postcopy", "--postcopy-bandwidth", "64K"];

/// A guest that touches none of its pages unless told, half-way through a postcopy.
pub struct HalfMoved {
    pub here: Ferry,
    pub there: Ferry,
    pub guest: Guest,
    pub migration: Migration,
}

pub fn half_moved(lab: &Lab, cmdline: &str) -> HalfMoved {
    let mut here = lab.run(&Hardware { memory: "256M", cpus: 1, ..Hardware::default() }, cmdline);
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    let mut there = lab.receive(Transport::Tcp);
    let mut client = here.client();
    let migration = lab.migrate(&here, &there.address, &TRICKLE);
    wait_for_migration(&mut client, "postcopy-active");
    assert_eq!(here.state(), "finish-migrate");
    guest.moved_to(&mut there);
    guest.beats(3);
    HalfMoved { here, there, guest, migration }
}

#[test]
fn a_guest_that_lost_its_source_runs_until_it_touches_a_missing_page() {
    let lab = Lab::new();
    // Nothing is touched until the last check of everything.
    let HalfMoved { mut here, mut there, mut guest, migration } = half_moved(&lab, "fill=64M rate=0 verify=0 heartbeat=20 run=10");
    // So long that a line of counters was said here, too: of the kernel's own pages none is missing any more.
    guest.beats(60);
    here.process.kill();
    migration.fails(&["the guest had been handed over to the destination, which may miss pages of it"]);
    let said = there.process.stderr.wait_for("pages are missing");
    assert!(said.contains("the connection to the source was lost") && !said.contains("waits for"), "{said}");
    guest.beats(10);
    let said = there.process.stderr.wait_for("had not sent before the link was lost");
    let line = said.lines().find(|line| line.contains("waits for")).unwrap();
    assert!(line.contains("page ") && line.contains("guest address 0x"), "{line}");
    // Nobody can help it, but a person can end it.
    there.command("quit");
    there.ends_with(1);
}

#[test]
fn a_source_that_lost_its_destination_never_runs_the_guest_again() {
    let lab = Lab::new();
    let HalfMoved { mut here, mut there, mut guest, migration } = half_moved(&lab, "fill=64M rate=0 verify=0 heartbeat=20");
    there.process.kill();
    migration.fails(&["the connection to the destination was lost", "does not run here again", "`ferry recover`"]);
    assert_eq!(here.state(), "postmigrate");
    assert_eq!(here.migration_status(), "postcopy-paused");
    let refusal = here.refusal("cont", json!({}));
    assert!(refusal.contains("moved to another host and never runs here again"), "{refusal}");
    let refusal = here.refusal("migrate", json!({ "uri": "tcp:127.0.0.1:1" }));
    assert!(refusal.contains("a migration is under way"), "{refusal}");
    guest.hear_all();
    here.command("quit");
    here.ends_with(1);
    let said = here.process.stderr.text_to_end();
    assert!(said.contains("does not run here again"), "{said}");
}

#[test]
fn what_a_postcopy_still_needs_is_not_taken_away() {
    let lab = Lab::new();
    let HalfMoved { mut here, mut there, mut guest, migration } = half_moved(&lab, "fill=64M rate=0 verify=0 heartbeat=20");
    let refusal = here.command_fails("quit");
    assert!(refusal.contains("still needs pages from here"), "{refusal}");
    assert!(!here.command_fails("cancel").is_empty());
    let refusal = there.refusal("migrate", json!({ "uri": here.address }));
    assert!(!refusal.is_empty());
    // The rest at full speed.
    here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 })).unwrap();
    migration.succeeds();
    here.ends_with(0);
    guest.beats(3);
    assert_eq!(there.state(), "running");
    assert!(there.process.ends_within(Duration::ZERO).is_none());
}

/// What was left of a guest after one side of its migration was killed.
enum Left {
    AtTheSource(Ferry, Guest),
    AtTheDestination(Ferry, Guest),
    Nowhere,
}

/// Kills one side some time into a migration, and finds out where the guest is: in one place at most.
fn kill_one_side(lab: &Lab, mut here: Ferry, mut guest: Guest, mode: &str, kill_source: bool, after: Duration) -> Left {
    let mut there = lab.receive(Transport::Tcp);
    let mut migration = lab.migrate(&here, &there.address, &["--mode", mode, "--max-bandwidth", "400M", "--postcopy-bandwidth", "100M"]);
    migration.ends_within(after);
    if kill_source {
        here.process.kill();
        migration.end();
        guest.moved_to(&mut there);
        // Its first word, its last, or the sentence that it waits in vain.
        if there.process.ends_within(Duration::ZERO).is_none() && guest.says_something(Duration::from_secs(5)) == More::Nothing {
            let said = there.process.stderr.text_so_far();
            // Killed before it had said anything, the source is one that never came, and the destination waits on.
            let never_began = there.state() == "inmigrate" && there.migration_status() == "none";
            let waits = said.contains("the guest waits for") || said.contains("only the source knows");
            assert!(never_began || waits, "the guest neither runs nor ends, and nobody says why: {said}");
            return Left::Nowhere;
        }
        if there.process.ends_within(Duration::from_millis(500)).is_some() {
            there.ends_with(1);
            return Left::Nowhere;
        }
        let said = there.process.stderr.text_so_far();
        return if said.contains("pages are missing") || said.contains("only the source knows") {
            Left::Nowhere
        } else {
            Left::AtTheDestination(there, guest)
        };
    }
    there.process.kill();
    let ended = migration.end();
    if ended.end == End::Status(0) {
        // Nothing was missing when it died.
        here.ends_with(0);
        return Left::Nowhere;
    }
    // What `ferry migrate` has seen may be ahead of what follows from it.
    wait_until(&mut here.client(), "the guest's state is settled", |_| here.state() != "finish-migrate");
    match here.state().as_str() {
        "running" => {
            assert!(ended.said.contains("the guest goes on at the source"), "{}", ended.said);
            assert_eq!(there.console().text_to_end(), "", "the guest ran at the destination and goes on at the source");
            guest.beats(3);
            Left::AtTheSource(here, guest)
        }
        "postmigrate" => {
            assert!(ended.said.contains("does not run here again"), "{}", ended.said);
            guest.moved_to(&mut there);
            guest.hear_all();
            here.command("quit");
            here.ends_with(1);
            Left::Nowhere
        }
        other => panic!("the source is in state {other} after: {}", ended.said),
    }
}

#[test]
fn whoever_is_killed_the_guest_is_never_in_two_places() {
    let lab = Lab::new();
    let boot = || {
        let mut here = lab.run(&Hardware { memory: "128M", cpus: 1, ..Hardware::default() }, "fill=48M rate=3000 heartbeat=10");
        let mut guest = Guest::booting_at(&mut here);
        guest.beats(1);
        (here, guest)
    };
    let mut random = random_numbers();
    let (mut here, mut guest) = boot();
    let mut counts = [0; 3];
    for round in 0..20 {
        let (mode, kill_source) = (["auto", "postcopy", "precopy"][round % 3], round % 4 == 3);
        // A source is now and then killed when its guest has arrived, too.
        let after = Duration::from_micros(random() % if kill_source { 1_000_000 } else { 400_000 });
        let begin = Instant::now();
        let left = kill_one_side(&lab, here, guest, mode, kill_source, after);
        println!(
            "round {round}: {mode}, {} killed after {after:?}, decided after {:?}",
            if kill_source { "source" } else { "destination" },
            begin.elapsed()
        );
        (here, guest) = match left {
            Left::AtTheSource(ferry, guest) => {
                counts[0] += 1;
                (ferry, guest)
            }
            Left::AtTheDestination(ferry, guest) => {
                counts[1] += 1;
                (ferry, guest)
            }
            Left::Nowhere => {
                counts[2] += 1;
                boot()
            }
        };
    }
    println!("the guest was left at the source, at the destination, nowhere: {counts:?}");
    guest.checks_every_page();
}

/// Numbers that are others in every run: a moment that is never tried again proves little.
fn random_numbers() -> impl FnMut() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    let state = RandomState::new();
    let mut count = 0u64;
    move || {
        count += 1;
        state.hash_one(count)
    }
}
