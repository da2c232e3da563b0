//! Disks that go along: images that the destination makes, whole at the end, and never whole in name only.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::disk::{SmallStorage, TestDisk};
use super::ferry::{Ferry, wait_for_migration, wait_until};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::migration::Migration;
use super::proxy::Proxy;
use super::puppet::Puppet;
use super::recovery::wait_for_pause;

/// The last block has 512 bytes.
const SIZE: u64 = (64 << 20) + 512;
const MIB: u64 = 1 << 20;

/// A disk of which every fourth MiB holds something, some of that zeros, and the last block as well.
fn filled(lab: &Lab) -> TestDisk {
    let disk = lab.disk(SIZE);
    let file = File::options().write(true).open(&disk.path).unwrap();
    let mut contents = vec![0; MIB as usize];
    for at in (0..SIZE).step_by(4 * MIB as usize) {
        for (index, word) in contents.chunks_exact_mut(8).enumerate() {
            // Each fifth page is zero.
            let number = if index / 512 % 5 == 0 { 0 } else { (at + index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) };
            word.copy_from_slice(&number.to_le_bytes());
        }
        file.write_all_at(&contents[..(SIZE - at).min(MIB) as usize], at).unwrap();
    }
    disk
}

/// A guest that is to be moved.
struct Begun {
    lab: Lab,
    disk: TestDisk,
    here: Ferry,
    guest: Guest,
}

/// A guest that writes to such a disk, also where it is a hole, and checks what it reads.
fn begin() -> Begun {
    let lab = Lab::new();
    let disk = filled(&lab);
    let (here, guest) = run(&lab, &disk);
    Begun { lab, disk, here, guest }
}

fn run(lab: &Lab, disk: &TestDisk) -> (Ferry, Guest) {
    let hardware = Hardware { memory: "64M", cpus: 2, disk: Some(disk), ..Hardware::default() };
    let mut ferry = lab.run(&hardware, "fill=16M rate=1000 order=random disk=on disk_rate=500 heartbeat=20");
    let mut guest = Guest::booting_at(&mut ferry);
    guest.writes_blocks(100);
    (ferry, guest)
}

fn receive(lab: &Lab, transport: Transport, copy: &Path) -> Ferry {
    lab.receive_with(transport, &["--disk", &format!("id=root,path={}", copy.display())])
}

fn copy(lab: &Lab, source: &Ferry, address: &str, options: &[&str]) -> Migration {
    lab.migrate(source, address, &[&["--storage", "copy"], options].concat())
}

fn incoming(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}.incoming", path.display()))
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// What the guest has not written since is as it was at the source, and what it has written is whole.
fn check(disk: &TestDisk, copy: &Path, guest: &Guest) {
    let (before, now) = (disk.snapshot(), TestDisk::at(copy, SIZE).snapshot());
    let magic = guest.fact("disk", "magic");
    let (written, _) = now.check(magic);
    assert!(written > 0);
    assert_eq!(now.changed_by_others(&before, magic), Vec::<usize>::new());
    let last = |path: &Path| fs::read(path).unwrap()[(SIZE - 512) as usize..].to_vec();
    assert_eq!(last(copy), last(&disk.path));
}

/// Ends the guest, whose whole disk is here.
fn ends_well(mut ferry: Ferry, mut guest: Guest, disk: &TestDisk, copy: &Path) {
    guest.writes_blocks(200);
    guest.checks_every_page();
    ferry.ask("stop");
    guest.hear_all();
    check(disk, copy, &guest);
    ferry.command("quit");
    ferry.ends_with(0);
    assert!(!incoming(copy).exists());
}

fn arrives(mode: &str, transport: Transport, options: &[&str]) {
    let Begun { lab, disk, mut here, mut guest } = begin();
    let path = lab.path("copy");
    let mut there = receive(&lab, transport, &path);
    let options = [&["--mode", mode, "--downtime", "2s"], options].concat();
    let (ended, report) = copy(&lab, &here, &there.address, &options).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    let stale = format!("{} is stale: the guest writes to its copy", disk.path.display());
    assert!(here.process.stderr.text_to_end().contains(&stale) && ended.said.contains("stale"), "{}", ended.said);
    assert_eq!(report.stale_images, [disk.path.display().to_string()]);
    assert!(report.normal_blocks > 0 && report.zero_blocks > 0 && report.bytes.blocks >= report.normal_blocks * 4096 / 2, "{report:?}");
    // Sparse as it was, but for what the guest has written since.
    assert!(report.normal_blocks * 4096 < 3 * allocated(&disk.path), "{report:?}");
    let left = fs::read(&disk.path).unwrap();
    guest.writes_blocks(50);
    assert!(left == fs::read(&disk.path).unwrap(), "somebody has written to the image at the source");
    ends_well(there, guest, &disk, &path);
}

#[test]
fn a_disk_goes_along_by_precopy() {
    arrives("precopy", Transport::Unix, &[]);
}

#[test]
fn a_disk_goes_along_by_postcopy_and_the_guest_waits_for_what_it_reads() {
    arrives("postcopy", Transport::Tcp, &["--postcopy-bandwidth", "16M"]);
}

#[test]
fn a_disk_goes_along_compressed_on_several_connections() {
    arrives("auto", Transport::Tcp, &["--channels", "3", "--compression", "lz4"]);
}

#[test]
fn images_of_a_guest_that_stands_still_compare_equal_and_are_as_sparse() {
    let lab = Lab::new();
    let disk = filled(&lab);
    for mode in ["precopy", "postcopy"] {
        let (mut here, mut guest) = run(&lab, &disk);
        here.ask("stop");
        guest.hear_all();
        let path = lab.path("copy");
        let mut there = receive(&lab, Transport::Tcp, &path);
        let mut client = here.client();
        let migration = copy(&lab, &here, &there.address, &["--mode", mode]);
        wait_for_migration(&mut client, "completed");
        migration.succeeds();
        here.ends_with(0);
        assert_eq!(there.state(), "paused");
        assert!(fs::read(&disk.path).unwrap() == fs::read(&path).unwrap(), "{mode}");
        assert!(allocated(&path) <= allocated(&disk.path), "{} at the source, {} here", allocated(&disk.path), allocated(&path));
        guest.moved_to(&mut there);
        there.ask("cont");
        ends_well(there, guest, &disk, &path);
    }
}

#[test]
fn a_disk_that_has_come_goes_on() {
    let Begun { lab, disk, mut here, mut guest } = begin();
    let (first, second) = (lab.path("copy"), lab.path("copy"));
    // Copied, then shared, then copied again.
    for (path, storage) in [(&first, "copy"), (&first, "shared"), (&second, "copy")] {
        let mut there = receive(&lab, Transport::Unix, path);
        let mut client = there.client();
        lab.migrate(&here, &there.address, &["--mode", "postcopy", "--storage", storage]).succeeds();
        here.ends_with(0);
        guest.moved_to(&mut there);
        // The source may hear of it sooner.
        wait_until(&mut client, "all of it is there", |_| there.migration_status() == "completed");
        guest.writes_blocks(50);
        here = there;
    }
    ends_well(here, guest, &disk, &second);
}

#[test]
fn lost_links_cost_nothing_of_a_disk_either() {
    let Begun { lab, disk, mut here, mut guest } = begin();
    here.execute("block-dirty-bitmap-add", json!({ "node": "root", "name": "backup", "granularity": 4096 })).unwrap();
    let path = lab.path("copy");
    let mut there = receive(&lab, Transport::Tcp, &path);
    let mut client = here.client();
    let mut migration = copy(&lab, &here, &there.address, &["--mode", "postcopy", "--postcopy-bandwidth", "2M"]);
    wait_for_migration(&mut client, "postcopy-active");
    guest.moved_to(&mut there);
    assert!(incoming(&path).exists() && !path.exists());
    // What is not there cannot be read by others.
    there.execute("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": lab.path("nbd") } } })).unwrap();
    let refusal = there.refusal("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "root" }));
    assert!(refusal.contains("has not wholly arrived"), "{refusal}");
    for round in 0..6 {
        guest.beats(1);
        [&here, &there][round % 2].ask("migrate-pause");
        migration.fails(&["`ferry recover` joins"]);
        wait_for_pause(&here);
        wait_for_pause(&there);
        migration = lab.recover(&here, &there.address);
        wait_for_migration(&mut client, "postcopy-active");
    }
    wait_until(&mut there.client(), "a wait for a block that has ended", |_| {
        there.ask("query-migrate")["ferry"]["progress"]["block-waits"]["waited"].as_u64() > Some(0)
    });
    let progress = there.ask("query-migrate");
    assert!(progress["disk"]["remaining"].as_u64().unwrap() > 0 && progress["disk"]["total"] == SIZE.next_multiple_of(4096), "{progress}");
    let status = there.command("status");
    assert!(status.contains("of 64.0 MiB of disks remaining"), "{status}");
    here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 })).unwrap();
    let (_, report) = migration.succeeds();
    assert_eq!(report.recoveries, 6);
    assert!(report.block_waits.as_ref().is_some_and(|waits| waits.waited > 0 && waits.max_us >= waits.p50_us), "{report:?}");
    here.ends_with(0);
    there.execute("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "root" })).unwrap();
    there.ask("stop");
    guest.hear_all();
    let bitmap = &there.ask("query-block")[0]["inserted"]["dirty-bitmaps"][0];
    assert!(bitmap["count"].as_u64().unwrap() > 0 && bitmap["busy"] == false, "{bitmap}");
    there.ask("cont");
    ends_well(there, guest, &disk, &path);
}

#[test]
fn a_guest_whose_source_has_died_runs_until_it_needs_a_block_which_is_named() {
    let Begun { lab, disk, mut here, mut guest } = begin();
    let path = lab.path("copy");
    let mut there = receive(&lab, Transport::Tcp, &path);
    let mut client = here.client();
    // All of RAM is there soon, and little of the disk.
    let mut migration = copy(&lab, &here, &there.address, &["--mode", "postcopy", "--postcopy-bandwidth", "16M"]);
    wait_for_migration(&mut client, "postcopy-active");
    guest.moved_to(&mut there);
    // The source says it when it has decided: the word may still be on its way, and would be lost with the source.
    guest.beats(1);
    wait_until(&mut there.client(), "all of RAM", |_| there.ask("query-migrate")["ram"]["remaining"] == 0);
    here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 1 << 20 })).unwrap();
    here.process.kill();
    migration.process.kill();
    migration.ends_within(super::output::LIMIT);
    wait_for_pause(&there);
    let said = there.process.stderr.wait_for("which the source had not sent before the link was lost");
    assert!(said.contains("blocks of its disks are missing"), "{said}");
    // The whole image is nowhere, and so is its name.
    assert!(incoming(&path).exists() && !path.exists());
    there.command("quit");
    there.ends_with(1);
    let said = there.process.stderr.text_to_end();
    assert!(said.contains(&format!("what the guest has written, is in {}", incoming(&path).display())), "{said}");
    assert!(incoming(&path).exists() && !path.exists());
    let mut next = receive(&lab, Transport::Tcp, &path);
    let (mut again, _guest) = run(&lab, &disk);
    copy(&lab, &again, &next.address, &[]).fails(&[".incoming is there already", "the guest goes on at the source"]);
    next.end();
    again.command("quit");
    again.ends_with(0);
}

#[test]
fn the_disks_of_a_guest_that_has_ended_are_waited_for() {
    for ends_first in [true, false] {
        let lab = Lab::new();
        let disk = filled(&lab);
        let (mut here, mut puppet) = Puppet::boot_with(&lab, Some(&disk));
        let path = lab.path("copy");
        let mut there = receive(&lab, Transport::Tcp, &path);
        let mut client = here.client();
        let migration = copy(&lab, &here, &there.address, &["--mode", "postcopy", "--postcopy-bandwidth", "1M"]);
        wait_for_migration(&mut client, "postcopy-active");
        puppet.moved_to(&mut there);
        puppet.answers(&mut there);
        let refusal = there.refusal("quit", json!({}));
        assert!(refusal.contains("still coming from the source"), "{refusal}");
        wait_until(&mut there.client(), "all of RAM", |_| there.ask("query-migrate")["ram"]["remaining"] == 0);
        if ends_first {
            there.process.types("p");
        }
        here.ask("migrate-pause");
        migration.fails(&["`ferry recover` joins"]);
        wait_for_pause(&there);
        if !ends_first {
            there.process.types("p");
        }
        there.process.stderr.wait_for("but not all of its disks has come: this process waits for `ferry recover`");
        here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 })).unwrap();
        lab.recover(&here, &there.address).succeeds();
        here.ends_with(0);
        there.ends_with(0);
        assert!(fs::read(&disk.path).unwrap() == fs::read(&path).unwrap() && !incoming(&path).exists());
    }
}

#[test]
fn a_move_that_fails_leaves_no_image_and_a_retry_arrives() {
    let Begun { lab, disk, mut here, mut guest } = begin();
    let path = lab.path("copy");
    // Cancelled half-way.
    let mut there = receive(&lab, Transport::Tcp, &path);
    let mut client = here.client();
    let migration = copy(&lab, &here, &there.address, &["--mode", "precopy", "--max-bandwidth", "4M"]);
    wait_for_migration(&mut client, "active");
    assert!(incoming(&path).exists());
    migration.interrupt();
    migration.fails(&["cancelled"]);
    there.ends_with(1);
    assert!(!incoming(&path).exists() && !path.exists());
    // Nobody has said where it is to go, or something is there.
    let mut there = lab.receive(Transport::Tcp);
    copy(&lab, &here, &there.address, &[]).fails(&["--disk id=root,path=PATH", "the guest goes on at the source"]);
    there.ends_with(1);
    fs::write(&path, "precious").unwrap();
    let mut there = receive(&lab, Transport::Tcp, &path);
    copy(&lab, &here, &there.address, &[]).fails(&["is there already", "the guest goes on at the source"]);
    there.ends_with(1);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    fs::remove_file(&path).unwrap();
    // The link breaks.
    let mut there = receive(&lab, Transport::Tcp, &path);
    let proxy = Proxy::to(&there.address);
    let migration = copy(&lab, &here, &proxy.address, &["--mode", "precopy", "--max-bandwidth", "4M"]);
    wait_for_migration(&mut client, "active");
    proxy.cut();
    migration.fails(&["the guest goes on at the source"]);
    there.ends_with(1);
    assert!(!incoming(&path).exists());
    guest.writes_blocks(50);
    // A dry run makes nothing either.
    let mut there = receive(&lab, Transport::Tcp, &path);
    copy(&lab, &here, &there.address, &["--dry-run"]).succeeds();
    there.process.stderr.wait_for("still waiting for a guest");
    assert!(!incoming(&path).exists() && !path.exists());
    copy(&lab, &here, &there.address, &[]).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    ends_well(there, guest, &disk, &path);
}

#[test]
fn a_storage_that_is_full_at_the_destination_costs_nothing() {
    let Begun { lab, disk, mut here, mut guest } = begin();
    let storage = SmallStorage::mount(lab.path("storage"));
    let path = storage.path().join("copy");
    let mut there = receive(&lab, Transport::Tcp, &path);
    let failed = copy(&lab, &here, &there.address, &["--mode", "precopy"]);
    failed.fails(&["disk root", "No space left on device", "the guest goes on at the source"]);
    there.ends_with(1);
    guest.writes_blocks(50);
    // After the commit the guest is there, and waits for room.
    let mut there = receive(&lab, Transport::Tcp, &path);
    let migration = copy(&lab, &here, &there.address, &["--mode", "postcopy"]);
    migration.fails(&["No space left on device", "`ferry recover` joins"]);
    guest.moved_to(&mut there);
    wait_for_pause(&there);
    storage.make_room();
    there.execute("cont", json!({})).ok();
    lab.recover(&here, &there.address).succeeds();
    here.ends_with(0);
    there.execute("cont", json!({})).ok();
    ends_well(there, guest, &disk, &path);
}
