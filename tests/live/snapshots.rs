//! Frozen points in time of a disk that its guest goes on writing to. What they hold is tested beside their code.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde_json::json;

use super::ferry::{Ferry, wait_until};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};

/// The temporary files of a Ferry's snapshots, by their descriptors.
fn temporary_files(ferry: &Ferry) -> Vec<PathBuf> {
    let directory = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", ferry.process.id())).unwrap();
    let is_one = |path: &PathBuf| {
        std::fs::read_link(path).is_ok_and(|target| target.starts_with(&directory) && target.to_string_lossy().ends_with("(deleted)"))
    };
    descriptors.map(|entry| entry.unwrap().path()).filter(is_one).collect()
}

#[test]
fn snapshots_come_and_go_while_the_guest_writes_and_moves() {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    // All of it is data, so that all that is changed has something to keep.
    std::fs::write(&disk.path, vec![0x5a; 16 << 20]).unwrap();
    let hardware = Hardware { memory: "64M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=16M rate=500 disk=on disk_rate=500 run=8");
    let mut guest = Guest::booting_at(&mut here);
    guest.writes_blocks(20);
    assert_eq!(temporary_files(&here), [] as [PathBuf; 0]);
    let snapshot = |name: &str| json!({ "node": "root", "name": name });
    here.execute("block-snapshot-add", snapshot("a")).unwrap();
    here.execute("block-snapshot-add", snapshot("b")).unwrap();
    for (command, node, name, reason) in [
        ("block-snapshot-add", "root", "a", "the name 'a' is taken"),
        ("block-snapshot-add", "root", "root", "the name 'root' is taken"),
        ("block-snapshot-add", "root", "a/b", "has 1 to 31 letters"),
        ("block-snapshot-add", "other", "c", "device='other'"),
        ("block-snapshot-remove", "root", "c", "disk root has no snapshot 'c'"),
    ] {
        let refusal = here.refusal(command, json!({ "node": node, "name": name }));
        assert!(refusal.contains(reason), "{refusal}");
    }
    guest.writes_blocks(100);
    let files = temporary_files(&here);
    assert_eq!(files.len(), 2, "{files:?}");
    for file in files {
        let metadata = std::fs::metadata(&file).unwrap();
        // A cluster for each of a good part of the blocks; nobody else can read them.
        assert!(metadata.blocks() * 512 >= 20 << 16, "{} bytes", metadata.blocks() * 512);
        assert_eq!(metadata.mode() & 0o777, 0o600);
    }
    here.execute("block-snapshot-remove", snapshot("b")).unwrap();
    // A thread of its own frees it.
    wait_until(&mut here.client(), "one temporary file less", |_| temporary_files(&here).len() == 1);

    let mut there = lab.receive(Transport::Unix);
    lab.migrate(&here, &there.address, &["--mode", "postcopy"]).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    // It does not go along.
    assert!(there.refusal("block-snapshot-remove", snapshot("a")).contains("no snapshot"));
    assert_eq!(temporary_files(&there), [] as [PathBuf; 0]);
    guest.finishes();
    there.ends_with(0);
    let (count, digest) = disk.snapshot().check(guest.fact("disk", "magic"));
    assert_eq!((count, digest), (guest.fact("disk", "data_blocks"), guest.fact("disk", "digest")));
}
