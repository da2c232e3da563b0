//! `ferry backup` of a guest that writes all the time: backups are of one moment, and fit together wherever the guest was meanwhile.

use std::path::{Path, PathBuf};

use ferry::migrate::report::Status;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::disk::TestDisk;
use super::ferry::Ferry;
use super::gate::Gate;
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::nbd_client::tool;
use super::output::LIMIT;
use super::process::{End, Process};

const SIZE: u64 = 64 << 20;
/// Of the answers to a client that reads: its handshake is over, and its reading is not.
const HALF_WAY: usize = 300_000;
const WRITING: &str = "fill=16M rate=1000 disk=on disk_rate=400 disk_discard=on heartbeat=50";

fn hardware(disk: &TestDisk) -> Hardware<'_> {
    Hardware { memory: "64M", cpus: 1, disk: Some(disk), ..Hardware::default() }
}

fn backup(ferry: &Ferry, to: &Path, more: &[&str]) -> Process {
    let fixed = ["backup", "--qmp", ferry.qmp.to_str().unwrap(), "root", "--bitmap", "nightly", "--to", to.to_str().unwrap()];
    Process::ferry(fixed.iter().chain(more))
}

/// What it said last on stdout, as a program hears it.
fn succeeds(mut process: Process) -> Value {
    let said = process.stdout.take().unwrap().text_to_end();
    assert_eq!(process.ends_within(LIMIT), Some(End::Status(0)), "{}", process.stderr.text_so_far());
    let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    last["data"].clone()
}

fn fails(mut process: Process, words: &str) {
    let said = process.stderr.text_to_end();
    assert_eq!(process.ends_within(LIMIT), Some(End::Status(1)), "{said}");
    let sentence = said.lines().find(|line| line.starts_with("ferry: ")).unwrap_or_default();
    assert!(sentence.contains(words), "{said}");
}

/// A backup that stops half-way.
fn held(lab: &Lab, ferry: &Ferry, to: &Path, more: &[&str]) -> (Process, Gate) {
    let (server, path) = (lab.path("nbd"), lab.path("gate"));
    // One that is there already is somebody else's, and stays.
    let _ = ferry.execute("nbd-server-stop", json!({}));
    ferry.execute("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": server } } })).unwrap();
    let gate = Gate::before(&server, &path, HALF_WAY);
    let listen = format!("unix:{}", path.display());
    let process = backup(ferry, to, &[&["--listen", &listen], more].concat());
    gate.is_reached();
    (process, gate)
}

/// Takes a backup of a moment at which the guest stands still, and that it writes after; what the disk had at that moment, and the backup.
fn exact_backup(lab: &Lab, ferry: &Ferry, guest: &mut Guest, disk: &TestDisk, more: &[&str]) -> (Vec<u8>, PathBuf, Value) {
    let to = lab.path("backup");
    ferry.ask("stop");
    let content = std::fs::read(&disk.path).unwrap();
    let (process, gate) = held(lab, ferry, &to, more);
    ferry.ask("cont");
    guest.writes_blocks(100);
    gate.opens();
    let facts = succeeds(process);
    ferry.ask("nbd-server-stop");
    (content, to, facts)
}

fn restore(lab: &Lab, chain: &[&Path]) -> (Process, PathBuf) {
    let to = lab.path("restored");
    let arguments = ["backup", "restore", "--to", to.to_str().unwrap()].into_iter().chain(chain.iter().map(|path| path.to_str().unwrap()));
    (Process::ferry(arguments), to)
}

fn restores(lab: &Lab, chain: &[&Path], content: &[u8]) {
    let (process, to) = restore(lab, chain);
    succeeds(process);
    assert!(std::fs::read(to).unwrap() == content, "the restored image differs from the disk at that moment");
}

fn is_refused(lab: &Lab, chain: &[&Path], words: &str) {
    let (process, to) = restore(lab, chain);
    fails(process, words);
    assert!(!to.exists() && !to.with_extension("new").exists());
}

/// The names of the disk's bitmaps, without ids.
fn bitmaps(ferry: &Ferry) -> Vec<String> {
    let bitmaps = ferry.ask("query-block")[0]["inserted"]["dirty-bitmaps"].clone();
    let without_id = |name: &str| name.rsplit_once('.').map_or(name, |(name, _)| name).to_owned();
    bitmaps.as_array().into_iter().flatten().map(|bitmap| without_id(bitmap["name"].as_str().unwrap())).collect()
}

fn nothing_is_left(ferry: &Ferry) {
    assert_eq!(bitmaps(ferry), ["nightly", "nightly.since"]);
    assert_eq!(ferry.ask("query-block-exports"), json!([]));
    assert_eq!(ferry.ask("query-named-block-nodes").as_array().unwrap().len(), 1);
}

#[test]
fn backups_before_and_after_a_move_fit_together() {
    let lab = Lab::new();
    let disk = lab.disk(SIZE);
    let mut here = lab.run(&hardware(&disk), WRITING);
    let mut guest = Guest::booting_at(&mut here);
    guest.writes_blocks(100);
    fails(backup(&here, &lab.path("none"), &["--incremental"]), "take a full one");
    let (first, full, facts) = exact_backup(&lab, &here, &mut guest, &disk, &[]);
    assert_eq!((&facts["kind"], &facts["size"]), (&"full".into(), &SIZE.into()));
    nothing_is_left(&here);
    let raw = lab.path("raw");
    std::fs::write(&raw, &first).unwrap();
    tool("qemu-img", &[&"compare", &"-f", &"raw", &"-F", &"raw", &full, &raw]);
    restores(&lab, &[&full], &first);

    let mut there = lab.receive(Transport::Tcp);
    lab.migrate(&here, &there.address, &["--mode", "postcopy"]).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.writes_blocks(50);
    let (second, monday, facts) = exact_backup(&lab, &there, &mut guest, &disk, &[]);
    assert_eq!(facts["kind"], "incremental");
    assert!(facts["read"].as_u64().unwrap() < SIZE, "{facts}");
    nothing_is_left(&there);
    let (third, tuesday, _) = exact_backup(&lab, &there, &mut guest, &disk, &["--incremental"]);
    restores(&lab, &[&full, &monday], &second);
    restores(&lab, &[&full, &monday, &tuesday], &third);

    is_refused(&lab, &[&full, &tuesday], "was not made after");
    is_refused(&lab, &[&full, &tuesday, &monday], "was not made after");
    is_refused(&lab, &[&monday, &tuesday], "is an incremental backup; the first file is the full one");
    is_refused(&lab, &[&full, &full], "it is no incremental backup");
    let mut bytes = std::fs::read(&monday).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&monday, bytes).unwrap();
    is_refused(&lab, &[&full, &monday], "it is damaged");
    // A file that is there is a whole backup, and stays.
    fails(backup(&there, &tuesday, &[]), "--force");
    assert_eq!(succeeds(backup(&there, &tuesday, &["--full", "--force"]))["kind"], "full");
    nothing_is_left(&there);
    // It was started for this backup only.
    assert_eq!(there.refusal("nbd-server-stop", json!({})), "NBD server not running");
}

#[test]
fn a_backup_that_comes_to_no_end_loses_nothing() {
    let lab = Lab::new();
    let disk = lab.disk(SIZE);
    let mut ferry = lab.run(&hardware(&disk), WRITING);
    let mut guest = Guest::booting_at(&mut ferry);
    guest.writes_blocks(100);
    let (_, full, _) = exact_backup(&lab, &ferry, &mut guest, &disk, &[]);

    let killed = lab.path("killed");
    let (mut process, _gate) = held(&lab, &ferry, &killed, &[]);
    fails(backup(&ferry, &lab.path("second"), &[]), "is under way");
    process.kill();
    drop(process);
    assert!(!killed.exists());
    assert_eq!(bitmaps(&ferry).len(), 3);
    guest.writes_blocks(50);
    let (content, monday, facts) = exact_backup(&lab, &ferry, &mut guest, &disk, &["--incremental"]);
    assert_eq!(facts["kind"], "incremental");
    nothing_is_left(&ferry);
    restores(&lab, &[&full, &monday], &content);

    for more in [&["--full"][..], &["--incremental"]] {
        let interrupted = lab.path("interrupted");
        let (process, gate) = held(&lab, &ferry, &interrupted, more);
        process.signal(Signal::INT);
        gate.opens();
        fails(process, "interrupted; there is no backup");
        assert!(!interrupted.exists() && !PathBuf::from(format!("{}.new", interrupted.display())).exists());
        nothing_is_left(&ferry);
    }
    guest.writes_blocks(50);
    let (content, tuesday, _) = exact_backup(&lab, &ferry, &mut guest, &disk, &["--incremental"]);
    restores(&lab, &[&full, &monday, &tuesday], &content);
}

#[test]
fn a_backup_that_the_guest_moves_away_from_is_made_good_at_the_destination() {
    for mode in ["precopy", "postcopy"] {
        let lab = Lab::new();
        let disk = lab.disk(SIZE);
        let mut here = lab.run(&hardware(&disk), WRITING);
        let mut guest = Guest::booting_at(&mut here);
        guest.writes_blocks(100);
        let (_, full, _) = exact_backup(&lab, &here, &mut guest, &disk, &[]);
        guest.writes_blocks(100);
        let (process, gate) = held(&lab, &here, &lab.path("left"), &["--incremental"]);
        let mut there = lab.receive(Transport::Unix);
        let (_, report) = lab.migrate(&here, &there.address, &["--mode", mode]).succeeds();
        assert_eq!(report.status, Status::Completed);
        gate.opens();
        fails(process, "the guest moved to another host");
        here.ends_with(0);
        guest.moved_to(&mut there);
        guest.writes_blocks(50);
        let (content, monday, _) = exact_backup(&lab, &there, &mut guest, &disk, &["--incremental"]);
        nothing_is_left(&there);
        restores(&lab, &[&full, &monday], &content);
    }
}

#[test]
fn the_bitmap_outlives_ferry_and_is_not_relied_on_where_ferry_was_killed() {
    let lab = Lab::new();
    let disk = lab.disk(SIZE);
    let mut ferry = lab.run(&hardware(&disk), WRITING);
    let mut guest = Guest::booting_at(&mut ferry);
    guest.writes_blocks(50);
    let (_, full, _) = exact_backup(&lab, &ferry, &mut guest, &disk, &[]);
    guest.writes_blocks(50);
    ferry.command("quit");
    ferry.ends_with(0);
    let mut ferry = lab.run(&hardware(&disk), WRITING);
    let mut guest = Guest::booting_at(&mut ferry);
    guest.writes_blocks(50);
    let (content, monday, facts) = exact_backup(&lab, &ferry, &mut guest, &disk, &[]);
    assert_eq!(facts["kind"], "incremental");
    restores(&lab, &[&full, &monday], &content);

    ferry.process.kill();
    let mut ferry = lab.run(&hardware(&disk), WRITING);
    let mut guest = Guest::booting_at(&mut ferry);
    guest.writes_blocks(50);
    fails(backup(&ferry, &lab.path("none"), &["--incremental"]), "the bitmap is inconsistent");
    let (content, full, facts) = exact_backup(&lab, &ferry, &mut guest, &disk, &[]);
    assert_eq!(facts["kind"], "full");
    restores(&lab, &[&full], &content);
    nothing_is_left(&ferry);
}
