//! Migrations that wait for a person when the guest stands still, and peers that hang.

use ferry::qmp::client::Client;
use rustix::process::Signal;
use serde_json::json;

use super::ferry::{Ferry, execute, wait_for_migration};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::migration::Migration;

const HARDWARE: Hardware = Hardware { memory: "256M", cpus: 1, disk: None, readonly: false };

struct Waiting {
    there: Ferry,
    client: Client,
    migration: Migration,
}

fn boot(lab: &Lab) -> (Ferry, Guest) {
    let mut here = lab.run(&HARDWARE, "fill=32M rate=2000 heartbeat=20");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    (here, guest)
}

/// Begins to move the guest, up to the wait.
fn wait_before_switchover(lab: &Lab, here: &Ferry, mode: &str) -> Waiting {
    let there = lab.receive(Transport::Tcp);
    let mut client = here.client();
    let migration = lab.migrate(here, &there.address, &["--pause-before-switchover", "--mode", mode]);
    wait_for_migration(&mut client, "pre-switchover");
    Waiting { there, client, migration }
}

#[test]
fn a_guest_is_handed_over_when_a_person_says_so() {
    let lab = Lab::new();
    let (mut here, mut guest) = boot(&lab);
    assert!(here.command_fails("continue").contains("no migration from here is under way"));
    for mode in ["precopy", "postcopy"] {
        let Waiting { mut there, mut client, migration } = wait_before_switchover(&lab, &here, mode);
        assert_eq!((here.migration_status().as_str(), here.state().as_str()), ("pre-switchover", "finish-migrate"));
        assert!(here.command_fails("resume").contains("a migration is handing it over"));
        let refusal = here.refusal("migrate-continue", json!({ "state": "device" }));
        assert!(refusal.contains("'pre-switchover'"), "{refusal}");
        // A fifth of a second of the guest's silence, as its console tells.
        guest.is_silent_for(std::time::Duration::from_millis(200));
        here.command("continue");
        wait_for_migration(&mut client, "device");
        let (ended, report) = migration.succeeds();
        assert_eq!(report.postcopy, mode == "postcopy");
        let downtime = report.downtime;
        assert!(downtime.pre_switchover_us >= 200_000 && downtime.predicted_us < 200_000, "{downtime:?}");
        assert!(downtime.total_us > downtime.pre_switchover_us, "{downtime:?}");
        assert!(ended.said.contains("`ferry continue` hands it over") && ended.said.contains("  pre-switchover"), "{}", ended.said);
        here.ends_with(0);
        guest.moved_to(&mut there);
        guest.checks_every_page();
        here = there;
    }
}

#[test]
fn a_wait_that_is_cancelled_or_cut_lets_the_guest_go_on() {
    let lab = Lab::new();
    let (mut here, mut guest) = boot(&lab);
    for twice in [false, true] {
        let Waiting { mut there, mut client, migration } = wait_before_switchover(&lab, &here, "auto");
        for _ in 0..=u32::from(twice) {
            execute(&mut client, "migrate_cancel", json!({})).unwrap();
        }
        migration.fails(&["the migration was cancelled", "the guest goes on at the source"]);
        there.ends_with(1);
        guest.beats(3);
    }
    let Waiting { mut there, migration, .. } = wait_before_switchover(&lab, &here, "auto");
    there.process.kill();
    migration.fails(&["the guest goes on at the source"]);
    guest.beats(3);

    let mut there = lab.receive(Transport::Unix);
    // Without the option nobody is waited for.
    lab.migrate(&here, &there.address, &[]).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.checks_every_page();
}

#[test]
fn a_source_that_hangs_while_the_guest_waits_for_a_page_is_noticed_and_joined_again() {
    let lab = Lab::new();
    let (mut here, mut guest) = boot(&lab);
    // On one host nothing but silence tells of a process that hangs.
    let mut there = lab.receive(Transport::Unix);
    let mut watcher = there.client();
    let migration = lab.migrate(&here, &there.address, &["--mode", "postcopy", "--postcopy-bandwidth", "1M"]);
    wait_for_migration(&mut watcher, "postcopy-active");
    here.process.signal(Signal::STOP);
    wait_for_migration(&mut watcher, "postcopy-paused");
    let status = there.command("status");
    assert!(status.contains("waits for"), "{status}");
    here.process.signal(Signal::CONT);
    migration.fails(&["`ferry recover`"]);
    here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 })).unwrap();
    let (_, report) = lab.recover(&here, &there.address).succeeds();
    assert_eq!(report.recoveries, 1);
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.checks_every_page();
}

#[test]
fn a_destination_that_hangs_in_the_switch_is_not_waited_for_long() {
    let lab = Lab::new();
    let (here, mut guest) = boot(&lab);
    let Waiting { mut there, migration, .. } = wait_before_switchover(&lab, &here, "auto");
    there.process.signal(Signal::STOP);
    here.command("continue");
    migration.fails(&["the destination did not load the guest's state in time", "the guest goes on at the source"]);
    guest.beats(3);
    there.process.signal(Signal::CONT);
    there.ends_with(1);
    guest.checks_every_page();
}
