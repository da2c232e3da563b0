//! What people do while a migration goes on.

use std::time::Duration;

use ferry::migrate::report::Status;
use ferry::qmp::client::Client;
use serde_json::json;

use super::ferry::{Ferry, wait_for_event, wait_for_migration};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::migration::Migration;
use super::ram;

const SLOW: [&str; 2] = ["--max-bandwidth", "4M"];
/// A guest that is moved within seconds.
const SMALL: Hardware = Hardware { memory: "256M", cpus: 1, disk: None, readonly: false };

/// A guest that is moving, slowly, in its first pass.
struct Moving {
    here: Ferry,
    there: Ferry,
    guest: Guest,
    client: Client,
    migration: Migration,
}

impl Moving {
    fn new(lab: &Lab, hardware: &Hardware, cmdline: &str, arguments: &[&str]) -> Self {
        let mut here = lab.run(hardware, cmdline);
        let mut guest = Guest::booting_at(&mut here);
        guest.beats(1);
        let there = lab.receive(Transport::Tcp);
        let mut client = here.client();
        let migration = lab.migrate(&here, &there.address, arguments);
        wait_for_migration(&mut client, "active");
        Moving { here, there, guest, client, migration }
    }
}

#[test]
fn postcopy_on_demand() {
    let lab = Lab::new();
    let hardware = Hardware { memory: "256M", cpus: 2, ..Hardware::default() };
    let Moving { mut here, mut there, mut guest, migration, .. } = Moving::new(&lab, &hardware, "fill=64M rate=5000", &SLOW);
    here.command("start-postcopy");
    let (_, report) = migration.succeeds();
    // None, if it was asked for before the first one began.
    assert!(report.postcopy && report.passes.len() <= 1, "{report:?}");
    // The pass would take 16 seconds.
    assert!(report.total_us < 10_000_000, "{report:?}");
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.checks_every_page();
}

#[test]
fn a_guest_is_paused_and_resumed_while_it_moves() {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    let hardware = Hardware { memory: "256M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let arguments = ["--mode", "precopy", "--max-bandwidth", "4M"];
    let Moving { mut here, mut there, mut guest, migration, .. } =
        Moving::new(&lab, &hardware, "fill=32M rate=5000 disk=on heartbeat=20", &arguments);
    let other = lab.receive(Transport::Unix);

    here.command("pause");
    guest.is_silent_for(Duration::from_millis(200));
    here.command("resume");
    guest.beats(5);

    let refusal = here.refusal("migrate", json!({ "uri": other.address }));
    assert!(refusal.contains("a migration is under way"), "{refusal}");
    let refusal = here.command_fails("start-postcopy");
    assert!(refusal.contains("mode precopy"), "{refusal}");
    assert!(here.command("status").contains("migration  active, pass 1"));

    // The migration must hear of it, or this would take a quarter of a minute.
    here.execute("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": 2000 })).unwrap();
    let (_, report) = migration.succeeds();
    assert!(!report.postcopy && report.total_us < 7_000_000, "{report:?}");
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.checks_every_page();
}

#[test]
fn a_guest_that_is_paused_while_it_moves_arrives_paused() {
    let lab = Lab::new();
    let Moving { mut here, mut there, mut guest, migration, .. } = Moving::new(&lab, &SMALL, "fill=32M rate=2000 heartbeat=20", &SLOW);
    here.command("pause");
    here.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 })).unwrap();
    migration.succeeds();
    here.ends_with(0);
    assert_eq!(there.state(), "paused");
    guest.moved_to(&mut there);
    guest.is_silent_for(Duration::from_millis(200));
    there.command("resume");
    guest.checks_every_page();
}

#[test]
fn a_guest_powers_off_while_it_moves() {
    let lab = Lab::new();
    let Moving { mut here, mut there, mut guest, mut client, migration } = Moving::new(&lab, &SMALL, "fill=32M rate=2000 run=2", &SLOW);
    let event = wait_for_event(&mut client, "SHUTDOWN", |event| event["event"] == "SHUTDOWN");
    assert_eq!(event["data"], json!({ "guest": true, "reason": "guest-shutdown" }));
    guest.finishes();
    here.ends_with(0);
    let ended = migration.fails(&["the guest ended while it was being moved: it powered off"]);
    assert_eq!(ended.report.unwrap().status, Status::Failed);
    there.ends_with(1);
    let said = there.process.stderr.text_to_end();
    assert!(said.contains("the guest ended while it was being moved: it powered off"), "{said}");
}

#[test]
fn a_guest_crashes_while_it_moves() {
    let lab = Lab::new();
    let Moving { mut here, mut there, guest: _guest, mut client, migration } = Moving::new(&lab, &SMALL, "fill=32M rate=2000", &SLOW);
    ram::wipe(&here, 256 << 20);
    let event = wait_for_migration(&mut client, "failed");
    let error = "the guest ended while it was being moved: vCPU 0 cannot go on";
    assert!(event["data"]["report"]["error"].as_str().unwrap().contains(error), "{event:?}");
    wait_for_event(&mut client, "SHUTDOWN", |event| event["event"] == "SHUTDOWN" && event["data"]["reason"] == "guest-panic");
    here.ends_with(1);
    let ended = migration.fails(&[error]);
    assert_eq!(ended.report.unwrap().status, Status::Failed);
    there.ends_with(1);
}

#[test]
fn quitting_the_source_ends_the_migration() {
    let lab = Lab::new();
    let Moving { mut here, mut there, guest: _guest, migration, .. } = Moving::new(&lab, &SMALL, "fill=32M rate=2000", &SLOW);
    here.command("quit");
    here.ends_with(0);
    migration.fails(&["the migration was cancelled"]);
    there.ends_with(1);
}
