//! Migrations that succeed.

use super::guest::{self, Workload};
use super::hosts::{DestinationHost, SourceHost, assert_counts, request};
use crate::memory::PAGE_SIZE;
use crate::migrate::report::Mode;
use crate::migrate::{destination, source};

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
    assert_eq!(handle.missing_pages(), 0);
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
