//! Migrations that succeed.

use std::sync::Arc;
use std::time::Duration;

use super::guest::{self, Workload};
use super::hosts::{DestinationHost, Guest, SourceHost, assert_counts, request, slow};
use crate::block::dirty_bitmap::Granularity;
use crate::block::disk::Disk;
use crate::memory::PAGE_SIZE;
use crate::migrate::driver::owner::SourceRequest;
use crate::migrate::report::Mode;
use crate::migrate::{destination, source};
use crate::vm::config::DiskConfig;

const CALM: Workload = Workload { pages: 64, pause: 2000 };

/// Moves a running guest and compares all of its RAM.
fn moves(address: &str, mode: Mode, workload: Workload) -> source::Outcome {
    let (vm, config) = guest::start(workload, Vec::new());
    let source = SourceHost::new(vm, config, Vec::new());
    while guest::counter(&source.ram) <= workload.pages {
        std::thread::yield_now();
    }
    let destination = DestinationHost::new();
    let (handle, address) = destination.listen(address);
    let migration = source.migrate(request(&address, mode));
    let (outcome, moved) = source.outcome();
    assert!(matches!(outcome, source::Outcome::Completed(_)), "{outcome:?}");
    assert_eq!(destination.outcome(), destination::Outcome::Completed);
    assert_eq!(handle.missing().0, 0);
    assert!(migration.is_committed() && migration.cancel().is_err() && source.guest.lock().unwrap().is_none());
    let left = moved.expect("the source still has the RAM");
    assert_counts(&destination.ram());
    let arrived = destination.pause();
    guest::check(arrived.ram(), workload);
    assert!(guest::counter(arrived.ram()) > guest::counter(left.ram()));
    // What the guest does not write is as it was, all bytes of it.
    let written = guest::FIRST - 1..guest::FIRST + workload.pages;
    for page in (0..guest::RAM / PAGE_SIZE as u64).filter(|page| !written.contains(page)) {
        assert!(guest::contents(arrived.ram(), page) == guest::contents(left.ram(), page), "page {page:#x} differs");
    }
    outcome
}

fn unix() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let address = format!("unix:{}", directory.path().join("socket").display());
    (directory, address)
}

#[test]
fn precopy_over_tcp() {
    let outcome = moves("tcp:127.0.0.1:0", Mode::Precopy, CALM);
    assert!(!outcome.report().postcopy);
    assert!(outcome.report().downtime.total_us > 0);
}

#[test]
fn precopy_over_unix() {
    let (_directory, address) = unix();
    moves(&address, Mode::Precopy, CALM);
}

#[test]
fn postcopy_at_once() {
    let (_directory, address) = unix();
    let outcome = moves(&address, Mode::Postcopy, CALM);
    assert!(outcome.report().postcopy && outcome.report().faults.is_some());
}

#[test]
fn postcopy_over_tcp() {
    moves("tcp:127.0.0.1:0", Mode::Postcopy, CALM);
}

#[test]
fn a_fast_writer_ends_in_postcopy() {
    // It writes 12 MiB of pages again and again, while far fewer may be sent. What is left cannot be sent within the limit, however fast the
    // sockets' buffers take it.
    let workload = Workload { pages: 3000, pause: 1 };
    let (vm, config) = guest::start(workload, Vec::new());
    let source = SourceHost::new(vm, config, Vec::new());
    while guest::counter(&source.ram) <= workload.pages {
        std::thread::yield_now();
    }
    let destination = DestinationHost::new();
    let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
    let request = SourceRequest { downtime_limit: Duration::from_millis(1), ..slow(20_000_000, request(&address, Mode::Auto)) };
    let _migration = source.migrate(request);
    let (outcome, _moved) = source.outcome();
    assert!(matches!(&outcome, source::Outcome::Completed(report) if report.postcopy && !report.passes.is_empty()), "{outcome:?}");
    assert_eq!(destination.outcome(), destination::Outcome::Completed);
    assert_counts(&destination.ram());
    guest::check(destination.pause().ram(), workload);
}

#[test]
fn a_paused_guest_stays_paused_and_is_the_same_in_every_byte() {
    for mode in [Mode::Precopy, Mode::Postcopy] {
        let (vm, config) = guest::start(CALM, Vec::new());
        let source = SourceHost::new(vm, config, Vec::new());
        while guest::counter(&source.ram) <= CALM.pages {
            std::thread::yield_now();
        }
        let paused = source.guest.lock().unwrap().take().unwrap().pause();
        *source.guest.lock().unwrap() = Some(Guest::Paused(paused));
        let destination = DestinationHost::new();
        let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
        let _migration = source.migrate(request(&address, mode));
        let (outcome, moved) = source.outcome();
        assert!(matches!(outcome, source::Outcome::Completed(_)), "{outcome:?}");
        assert_eq!(destination.outcome(), destination::Outcome::Completed);
        let (left, guest) = (moved.unwrap(), destination.guest.lock().unwrap().take().unwrap());
        let Guest::Paused(arrived) = guest else { panic!("it was woken") };
        for page in 0..guest::RAM / PAGE_SIZE as u64 {
            assert!(guest::contents(arrived.ram(), page) == guest::contents(left.ram(), page), "page {page:#x} differs");
        }
        // The state came as well: it goes on where it was.
        let vm = arrived.resume().unwrap_or_else(|failed| panic!("{}", failed.error));
        assert_counts(vm.ram());
    }
}

fn disk(directory: &tempfile::TempDir, size: u64, id: &str) -> Arc<Disk> {
    let path = directory.path().join("image");
    if !path.exists() {
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    }
    Disk::open(DiskConfig { id: id.into(), path, readonly: false, options: Default::default() }).unwrap()
}

/// Moves a guest with a disk; returns the ranges of the bitmap `backup` as they arrived, and the warnings.
fn moves_bitmap(mode: Mode, there: &str) -> (Vec<std::ops::Range<u64>>, Vec<String>, Vec<std::ops::Range<u64>>) {
    let directory = tempfile::tempdir().unwrap();
    const SIZE: u64 = 300 << 20;
    let ours = disk(&directory, SIZE, "root");
    ours.acquire().unwrap();
    ours.bitmaps().add("backup", Granularity::new(512).unwrap(), true).unwrap();
    for sector in [0, 77, 65_535, 65_536, 70_000, SIZE / 512 - 1] {
        ours.bitmaps().mark(sector * 512, 512);
    }
    ours.bitmaps().mark(100 << 20, 3 << 20);
    let sent = ours.bitmaps().dirty_ranges("backup").unwrap();
    let theirs = disk(&directory, SIZE, there);
    let (vm, config) = guest::start(CALM, vec![ours.config().clone()]);
    let source = SourceHost::new(vm, config, vec![ours.clone()]);
    let destination = DestinationHost::with(vec![theirs.clone()], |_| {});
    let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
    let _migration = source.migrate(request(&address, mode));
    let (outcome, _moved) = source.outcome();
    assert!(matches!(outcome, source::Outcome::Completed(_)), "{outcome:?}");
    assert_eq!(destination.outcome(), destination::Outcome::Completed);
    assert!(theirs.io().is_ok() && ours.io().is_err(), "the lock went along");
    let arrived = theirs.bitmaps().dirty_ranges("backup").unwrap_or_default();
    (arrived, outcome.report().warnings.clone(), sent)
}

#[test]
fn bitmaps_and_disk_locks_go_along() {
    for mode in [Mode::Precopy, Mode::Postcopy] {
        let (arrived, warnings, sent) = moves_bitmap(mode, "root");
        assert_eq!((arrived, warnings), (sent, Vec::new()));
    }
}

#[test]
fn a_bitmap_of_an_unknown_disk_is_dropped_with_a_warning() {
    let (arrived, warnings, _) = moves_bitmap(Mode::Postcopy, "other");
    assert!(arrived.is_empty());
    assert!(matches!(&warnings[..], [warning] if warning.contains("no disk \"root\" here")), "{warnings:?}");
}
