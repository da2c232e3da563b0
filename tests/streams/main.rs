//! A newer Ferry understands what the last released one says: migrations that were recorded with each version of the protocol are read
//! again by both engines. A version's recordings are made once, by `FERRY_RECORD_STREAMS=tests/streams/vN cargo test --test live streams`,
//! and stay as they are.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, reason = "a test may stop where it finds something wrong")]

mod recording;

use std::fs;
use std::path::Path;

use ferry::migrate::wire::{Kind, VERSION};
use recording::Recording;

/// A recording has a file for each direction of each connection.
fn recorded(version: u16, name: &str) -> Recording {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/streams/v{version}/{name}"));
    let read = |index: usize, end: &str| fs::read(directory.join(format!("{index}-{end}"))).ok();
    let connection = |index| Some([read(index, "to-destination")?, read(index, "to-source")?]);
    let connections: Vec<_> = (0..).map_while(connection).collect();
    assert!(!connections.is_empty(), "nothing was recorded in {}", directory.display());
    Recording::new(&connections)
}

#[test]
fn whole_migrations_of_every_version_are_understood_on_both_sides() {
    for version in 1..=VERSION {
        // Disks can be copied since version 3.
        let copies = ["copy-precopy", "copy-postcopy"].into_iter().filter(|_| version >= 3);
        for name in ["precopy", "postcopy"].into_iter().chain(copies) {
            let recording = recorded(version, name);
            recording.is_understood_by_the_destination();
            recording.is_understood_by_the_source();
        }
    }
}

#[test]
fn recoveries_of_every_version_decode() {
    for version in 1..=VERSION {
        let kinds = recorded(version, "recovery").kinds();
        for kind in [Kind::Holding, Kind::Request, Kind::Done, Kind::Goodbye] {
            assert!(kinds.contains(&kind), "{kind:?}");
        }
    }
}
