//! What Ferries say to each other today, read as `tests/streams` reads what earlier ones said. Where `FERRY_RECORD_STREAMS` names a
//! directory it is kept there, for a version of the protocol that is to be released.

use std::path::PathBuf;

use serde_json::json;

use super::ferry::wait_for_migration;
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::pagestorm_kernel;
use super::proxy::Proxy;
use super::recovery::wait_for_pause;

#[path = "../streams/recording.rs"]
mod recording;

use ferry::migrate::wire::{HEADER_SIZE, Header, Kind};
use recording::Recording;

/// Moves a guest with a dirty bitmap, perhaps with its disk, and recovers once if that is asked for; what was said.
fn record(mode: &str, storage: &str, recovers: bool, name: &str) -> Recording {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    // Little, so that the recording is small; or much that does not compress and is hardly touched, so that it takes its time.
    let (cmdline, limit) = if recovers { ("fill=16M pattern=random rate=10", "64K") } else { ("fill=1M pattern=compressible", "1G") };
    let hardware = Hardware { memory: "32M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    // Its path rides along, and a recording is to be nobody's in particular.
    let kernel = lab.path("kernel");
    std::fs::copy(pagestorm_kernel::path(), &kernel).unwrap();
    let mut here = lab.run_with(&kernel, &hardware, &format!("{cmdline} disk=on"), &[]);
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    here.execute("block-dirty-bitmap-add", json!({ "node": "root", "name": "backup" })).unwrap();
    let copy = lab.path("copy");
    let to_copy = ["--disk", &format!("id=root,path={}", copy.display())];
    let mut there = lab.receive_with(Transport::Tcp, if storage == "copy" { &to_copy } else { &[] });
    let link = Proxy::recording(&there.address);
    let options = [
        "--mode",
        mode,
        "--storage",
        storage,
        "--downtime",
        "1s",
        "--channels",
        "1",
        "--compression",
        "zstd",
        "--postcopy-bandwidth",
        limit,
    ];
    let mut client = here.client();
    let moving = lab.migrate(&here, &link.address, &options);
    if recovers {
        wait_for_migration(&mut client, "postcopy-active");
        guest.moved_to(&mut there);
        guest.beats(1);
        here.ask("migrate-pause");
        moving.fails(&["broken on purpose"]);
        wait_for_pause(&here);
        here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 })).unwrap();
        lab.recover(&here, &link.address).succeeds();
    } else {
        moving.succeeds();
        guest.moved_to(&mut there);
    }
    here.ends_with(0);
    guest.checks_every_page();
    let recorded: Vec<_> = link.recorded().iter().map(|directions| directions.each_ref().map(|bytes| without_contents(bytes))).collect();
    if let Some(directory) = std::env::var_os("FERRY_RECORD_STREAMS") {
        let directory = PathBuf::from(directory).join(name);
        std::fs::create_dir_all(&directory).unwrap();
        for (index, [to_destination, to_source]) in recorded.iter().enumerate() {
            std::fs::write(directory.join(format!("{index}-to-destination")), to_destination).unwrap();
            std::fs::write(directory.join(format!("{index}-to-source")), to_source).unwrap();
        }
    }
    Recording::new(&recorded)
}

/// The frames of one direction, of `Pages` only the headers. One that was cut off is left out.
fn without_contents(mut bytes: &[u8]) -> Vec<u8> {
    let mut kept = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER_SIZE>() {
        let header = Header::decode(*header).unwrap();
        if rest.len() < header.length {
            break;
        }
        let is_pages = header.kind == Kind::Pages;
        kept.extend(&bytes[..HEADER_SIZE + if is_pages { 0 } else { header.length }]);
        bytes = &rest[header.length..];
    }
    kept
}

#[test]
fn what_is_said_today_is_understood_from_a_recording() {
    for mode in ["precopy", "postcopy"] {
        for (storage, name) in [("shared", mode.into()), ("copy", format!("copy-{mode}"))] {
            let recording = record(mode, storage, false, &name);
            recording.is_understood_by_the_destination();
            recording.is_understood_by_the_source();
        }
    }
    let kinds = record("postcopy", "shared", true, "recovery").kinds();
    assert!(kinds.contains(&Kind::Holding));
}
