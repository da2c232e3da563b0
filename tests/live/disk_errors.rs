//! Disks whose storage is full: the guest is paused, and nothing is lost.

use std::time::Duration;

use ferry::qmp::client::Client;
use serde_json::json;

use super::disk::{SmallStorage, TestDisk};
use super::ferry::{Ferry, wait_for_event};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};

/// Waits until the disk has paused the guest.
fn pauses(client: &mut Client) {
    let error = wait_for_event(client, "BLOCK_IO_ERROR", |event| event["event"] == "BLOCK_IO_ERROR");
    let data = &error["data"];
    assert_eq!(
        (&data["device"], &data["operation"], &data["action"], &data["nospace"]),
        (&"root".into(), &"write".into(), &"stop".into(), &true.into()),
        "{data}"
    );
    assert!(data["reason"].as_str().unwrap().contains("No space left"), "{data}");
    wait_for_event(client, "STOP", |event| event["event"] == "STOP");
}

fn io_status(ferry: &Ferry) -> String {
    ferry.ask("query-block")[0]["io-status"].as_str().unwrap().into()
}

/// A guest that writes to a disk of 32 MiB on a storage of 6 MiB until that is full.
fn full(lab: &Lab, cmdline: &str) -> (SmallStorage, TestDisk, Ferry, Guest, Client) {
    let storage = SmallStorage::mount(lab.path("storage"));
    let disk = TestDisk::create(storage.path().join("disk.img"), 32 << 20);
    let hardware = Hardware { memory: "64M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut ferry = lab.run(&hardware, &format!("fill=8M rate=500 disk=on disk_rate=1000 heartbeat=20 {cmdline}"));
    let mut guest = Guest::booting_at(&mut ferry);
    // Seconds before the disk is full.
    guest.beats(1);
    let mut client = ferry.client();
    pauses(&mut client);
    assert_eq!((ferry.state().as_str(), io_status(&ferry).as_str()), ("io-error", "nospace"));
    (storage, disk, ferry, guest, client)
}

#[test]
fn a_full_disk_pauses_the_guest_and_nothing_is_lost() {
    let lab = Lab::new();
    let (storage, disk, mut ferry, mut guest, mut client) = full(&lab, "run=8");
    guest.is_silent_for(Duration::from_millis(200));
    let status = ferry.command("status");
    assert!(status.contains("guest      io-error\ndisk       root has no room left on its storage"), "{status}");
    // It tries again, in vain.
    ferry.command("resume");
    pauses(&mut client);
    assert_eq!(ferry.state(), "io-error");
    storage.make_room();
    ferry.command("resume");
    assert_eq!((ferry.state().as_str(), io_status(&ferry).as_str()), ("running", "ok"));
    guest.writes_blocks(500);
    guest.finishes();
    ferry.ends_with(0);
    let said = ferry.process.stderr.text_to_end();
    assert!(said.contains("disk root failed: No space left on device") && said.contains("`ferry resume`"), "{said}");
    let (count, digest) = disk.snapshot().check(guest.fact("disk", "magic"));
    assert_eq!((count, digest), (guest.fact("disk", "data_blocks"), guest.fact("disk", "digest")));
}

#[test]
fn a_guest_that_a_full_disk_has_paused_moves_and_tries_again_there() {
    let lab = Lab::new();
    let (storage, disk, mut here, mut guest, _client) = full(&lab, "run=8");
    let mut there = lab.receive(Transport::Unix);
    lab.migrate(&here, &there.address, &["--mode", "postcopy"]).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    assert_eq!(there.state(), "paused");
    let mut client = there.client();
    there.command("resume");
    pauses(&mut client);
    storage.make_room();
    there.command("resume");
    guest.writes_blocks(200);
    guest.finishes();
    there.ends_with(0);
    let (count, digest) = disk.snapshot().check(guest.fact("disk", "magic"));
    assert_eq!((count, digest), (guest.fact("disk", "data_blocks"), guest.fact("disk", "digest")));
}

#[test]
fn a_disk_that_fills_while_its_guest_moves_neither_stops_the_move_nor_loses_anything() {
    let lab = Lab::new();
    let (storage, disk, mut here, mut guest, mut client) = full(&lab, "run=8");
    let mut there = lab.receive(Transport::Tcp);
    let migration = lab.migrate(&here, &there.address, &["--mode", "precopy", "--max-bandwidth", "4M"]);
    super::ferry::wait_for_migration(&mut client, "active");
    // Again and again full while the first pass goes on.
    for _ in 0..3 {
        here.command("resume");
        pauses(&mut client);
    }
    storage.make_room();
    here.command("resume");
    here.execute("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": 2000 })).unwrap();
    migration.succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.finishes();
    there.ends_with(0);
    let (count, digest) = disk.snapshot().check(guest.fact("disk", "magic"));
    assert_eq!((count, digest), (guest.fact("disk", "data_blocks"), guest.fact("disk", "digest")));
}
