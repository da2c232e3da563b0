//! Persistent dirty bitmaps over ends of every kind, and transactions while the guest writes: compared with what an outside look at the image
//! finds changed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::disk::{Snapshot, TestDisk};
use super::ferry::Ferry;
use super::guest::Guest;
use super::lab::{Hardware, Lab};

const DISK: u64 = 64 << 20;
const GRANULARITY: u64 = 4096;
const WRITING: &str = "fill=16M rate=1000 disk=on disk_rate=400";
/// Does not touch the disk.
const IDLE: &str = "fill=16M rate=0";

fn hardware(disk: &TestDisk) -> Hardware<'_> {
    Hardware { memory: "256M", cpus: 1, disk: Some(disk), ..Hardware::default() }
}

fn sidecar(disk: &TestDisk) -> PathBuf {
    let mut name = disk.path.clone().into_os_string();
    name.push(".bitmaps");
    name.into()
}

fn bitmap(ferry: &Ferry) -> Value {
    ferry.ask("query-block")[0]["inserted"]["dirty-bitmaps"][0].clone()
}

fn sha256(ferry: &Ferry) -> String {
    let answer = ferry.execute("x-debug-block-dirty-bitmap-sha256", json!({ "node": "root", "name": "b" })).unwrap();
    answer["sha256"].as_str().unwrap().into()
}

/// Boots a guest that writes and gives its disk the bitmap; returns what was on the disk at that moment.
fn with_bitmap(lab: &Lab, disk: &TestDisk, cmdline: &str) -> (Ferry, Guest, Snapshot) {
    let mut ferry = lab.run(&hardware(disk), cmdline);
    let mut guest = Guest::booting_at(&mut ferry);
    guest.beats(1);
    ferry.ask("stop");
    let before = disk.snapshot();
    let arguments = json!({ "node": "root", "name": "b", "granularity": GRANULARITY, "persistent": true });
    ferry.execute("block-dirty-bitmap-add", arguments).unwrap();
    ferry.ask("cont");
    guest.writes_blocks(50);
    (ferry, guest, before)
}

/// The next boot must find the bitmap as it was left.
fn comes_back(lab: &Lab, disk: &TestDisk, before: &Snapshot) -> Ferry {
    let expected = disk.snapshot().bitmap_sha256(before, GRANULARITY);
    let mut ferry = lab.run(&hardware(disk), IDLE);
    Guest::booting_at(&mut ferry).beats(1);
    let bitmap = bitmap(&ferry);
    let flags = ["recording", "persistent", "busy", "inconsistent"].map(|key| bitmap[key] == true);
    assert_eq!(flags, [true, true, false, false], "{bitmap}");
    assert_eq!(sha256(&ferry), expected);
    ferry
}

fn is_inconsistent(ferry: &Ferry) {
    let bitmap = bitmap(ferry);
    assert_eq!((&bitmap["inconsistent"], &bitmap["recording"], &bitmap["name"]), (&true.into(), &false.into(), &"b".into()), "{bitmap}");
}

#[test]
fn bitmaps_survive_every_clean_end() {
    let lab = Lab::new();
    let disk = lab.disk(DISK);
    let (mut ferry, mut guest, before) = with_bitmap(&lab, &disk, &format!("{WRITING} run=3"));
    // The guest powers off.
    guest.finishes();
    ferry.ends_with(0);
    let mut ferry = comes_back(&lab, &disk, &before);
    ferry.command("quit");
    ferry.ends_with(0);
    let mut ferry = comes_back(&lab, &disk, &before);
    for said in ["a second signal ends it at once", "ended by a signal"] {
        ferry.process.signal(Signal::TERM);
        ferry.process.stderr.wait_for(said);
    }
    ferry.ends_with(1);
    // A boot that fails.
    let mut ferry = lab.run_with(&lab.path("no-kernel"), &hardware(&disk), IDLE, &[]);
    ferry.ends_with(1);
    let mut ferry = comes_back(&lab, &disk, &before);
    ferry.command("quit");
    ferry.ends_with(0);
    // And goes on recording.
    let mut ferry = lab.run(&hardware(&disk), WRITING);
    Guest::booting_at(&mut ferry).writes_blocks(50);
    ferry.command("quit");
    ferry.ends_with(0);
    comes_back(&lab, &disk, &before);
}

#[test]
fn a_killed_ferry_leaves_bitmaps_inconsistent() {
    let lab = Lab::new();
    let disk = lab.disk(DISK);
    // Once before it was ever stored, once afterwards.
    let (mut ferry, _guest, _) = with_bitmap(&lab, &disk, WRITING);
    ferry.process.kill();
    let mut ferry = lab.run(&hardware(&disk), IDLE);
    ferry.process.stderr.wait_for("did not end cleanly");
    Guest::booting_at(&mut ferry).beats(1);
    is_inconsistent(&ferry);
    let words = "Bitmap 'b' is inconsistent and cannot be used";
    for command in ["clear", "enable", "disable"] {
        assert_eq!(ferry.refusal(&format!("block-dirty-bitmap-{command}"), json!({ "node": "root", "name": "b" })), words);
    }
    ferry.execute("block-dirty-bitmap-remove", json!({ "node": "root", "name": "b" })).unwrap();
    ferry.command("quit");
    ferry.ends_with(0);
    assert!(!sidecar(&disk).exists());

    let (mut ferry, _guest, before) = with_bitmap(&lab, &disk, WRITING);
    ferry.command("quit");
    ferry.ends_with(0);
    comes_back(&lab, &disk, &before).process.kill();
    let mut ferry = lab.run(&hardware(&disk), IDLE);
    Guest::booting_at(&mut ferry).beats(1);
    is_inconsistent(&ferry);
}

#[test]
fn an_image_changed_by_others_leaves_bitmaps_inconsistent() {
    let lab = Lab::new();
    let disk = lab.disk(DISK);
    let (mut ferry, _guest, _) = with_bitmap(&lab, &disk, WRITING);
    ferry.command("quit");
    ferry.ends_with(0);
    File::options().write(true).open(&disk.path).unwrap().write_all_at(&[1], DISK / 2).unwrap();
    let mut ferry = lab.run(&hardware(&disk), IDLE);
    ferry.process.stderr.wait_for("was changed after its dirty bitmaps had been stored");
    Guest::booting_at(&mut ferry).beats(1);
    is_inconsistent(&ferry);
}

#[test]
fn a_damaged_sidecar_costs_the_bitmaps_and_not_the_guest() {
    let lab = Lab::new();
    let disk = lab.disk(DISK);
    let (mut ferry, _guest, _) = with_bitmap(&lab, &disk, WRITING);
    ferry.command("quit");
    ferry.ends_with(0);
    let file = File::options().write(true).open(sidecar(&disk)).unwrap();
    file.write_all_at(&[0x55], file.metadata().unwrap().len() / 2).unwrap();
    let mut ferry = lab.run(&hardware(&disk), IDLE);
    ferry.process.stderr.wait_for("are lost: it is damaged");
    Guest::booting_at(&mut ferry).beats(1);
    assert_eq!(bitmap(&ferry), Value::Null);
}

/// As incremental backups do: what a bitmap has recorded goes to another one, and it begins anew, in one transaction.
#[test]
fn no_write_falls_between_the_actions_of_a_transaction() {
    let lab = Lab::new();
    let disk = lab.disk(DISK);
    let (ferry, mut guest, before) = with_bitmap(&lab, &disk, "fill=16M rate=0 verify=0 disk=on disk_rate=max");
    let mut client = ferry.client();
    let mut transaction = |actions: Value| super::ferry::execute(&mut client, "transaction", json!({ "actions": actions }));
    let action = |name: &str, data: Value| json!({ "type": format!("block-dirty-bitmap-{name}"), "data": data });
    let b = json!({ "node": "root", "name": "b" });
    for round in 0..200 {
        let name = format!("t{round}");
        transaction(json!([
            action("add", json!({ "node": "root", "name": name, "granularity": GRANULARITY, "disabled": true })),
            action("merge", json!({ "node": "root", "target": name, "bitmaps": ["b"] })),
            action("clear", b.clone()),
        ]))
        .unwrap();
        if round % 50 == 49 {
            guest.writes_blocks(50);
        }
    }
    ferry.ask("stop");
    let names: Vec<String> = (0..200).map(|round| format!("t{round}")).collect();
    let counts = ferry.ask("query-block")[0]["inserted"]["dirty-bitmaps"].clone();
    let filled = counts.as_array().unwrap().iter().filter(|bitmap| bitmap["count"] != 0).count();
    assert!(filled > 2, "the guest wrote while they went on: {counts}");
    transaction(json!([action("merge", json!({ "node": "root", "target": "b", "bitmaps": names }))])).unwrap();
    assert_eq!(sha256(&ferry), disk.snapshot().bitmap_sha256(&before, GRANULARITY));
}
