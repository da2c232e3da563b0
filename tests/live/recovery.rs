//! Links that are lost after the commit, and joined again: nothing is lost with them.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::ferry::{Ferry, wait_for_migration, wait_until};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::process::End;
use super::proxy::Proxy;
use super::ram;

fn migration(ferry: &Ferry) -> Value {
    ferry.ask("query-migrate")
}

/// Waits until this side knows that the link is lost.
pub fn wait_for_pause(ferry: &Ferry) {
    wait_until(&mut ferry.client(), "postcopy-paused", |_| ferry.migration_status() == "postcopy-paused");
}

#[test]
fn a_link_broken_twenty_times_costs_nothing() {
    let lab = Lab::new();
    let disk = lab.disk(256 << 20);
    let hardware = Hardware { memory: "256M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=160M rate=2000 order=random disk=on disk_rate=400 heartbeat=20");
    let mut guest = Guest::booting_at(&mut here);
    guest.writes_blocks(50);
    here.ask("stop");
    let before = disk.snapshot();
    here.execute("block-dirty-bitmap-add", json!({ "node": "root", "name": "backup", "granularity": 4096 })).unwrap();
    here.ask("cont");
    let mut there = lab.receive(Transport::Tcp);
    let mut client = here.client();
    let mut migration = lab.migrate(&here, &there.address, &["--mode", "postcopy", "--postcopy-bandwidth", "16M", "--channels", "3"]);
    wait_for_migration(&mut client, "postcopy-active");
    guest.moved_to(&mut there);
    for round in 0..20 {
        // The guest gets on in between, with the pages that it asks for.
        guest.beats(2);
        [&here, &there][round % 2].ask("migrate-pause");
        let ended = migration.fails(&["`ferry recover` joins"]);
        assert!(ended.report.is_none());
        wait_for_pause(&here);
        wait_for_pause(&there);
        let address = match round % 3 {
            // Another address, which the destination is told of.
            0 => {
                there.execute("migrate-recover", json!({ "uri": "tcp:127.0.0.1:0" })).unwrap();
                let said = there.process.stderr.wait_for("waiting for the source at ");
                let line = said.lines().rfind(|line| line.contains("waiting for the source at ")).unwrap();
                line.rsplit(' ').next().unwrap().to_string()
            }
            _ => there.address.clone(),
        };
        migration = lab.recover(&here, &address);
        wait_for_migration(&mut client, "postcopy-active");
    }
    here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 })).unwrap();
    let (_, report) = migration.succeeds();
    assert_eq!(report.recoveries, 20);
    here.ends_with(0);
    guest.checks_every_page();
    guest.writes_blocks(50);
    there.ask("stop");
    guest.hear_all();
    assert!(ram::check(&there, &guest, 256 << 20) >= (160 << 20) / 4096 - 2);
    let bitmap = &there.ask("query-block")[0]["inserted"]["dirty-bitmaps"][0];
    assert_eq!(bitmap["count"], disk.snapshot().changed(&before, 4096) as u64 * 4096, "{bitmap}");
    assert_eq!(bitmap["busy"], false);
    there.command("quit");
    there.ends_with(0);
}

#[test]
fn a_vcpu_that_waits_for_a_lost_page_is_shown_and_helped() {
    let lab = Lab::new();
    let hardware = Hardware { memory: "256M", cpus: 1, ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=128M rate=max order=random heartbeat=20");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    let mut there = lab.receive(Transport::Unix);
    let mut client = here.client();
    let broken = lab.migrate(&here, &there.address, &["--mode", "postcopy", "--postcopy-bandwidth", "64K"]);
    wait_for_migration(&mut client, "postcopy-active");
    guest.moved_to(&mut there);
    guest.beats(1);
    here.ask("migrate-pause");
    broken.fails(&["broken on purpose", "`ferry recover` joins"]);
    wait_until(&mut there.client(), "a waiting vCPU", |_| migration(&there)["ferry"]["progress"]["waiting-pages"].as_u64().unwrap() > 0);
    let said = there.process.stderr.wait_for("the guest waits for");
    assert!(said.contains("pages are missing") && said.contains("ferry recover"), "{said}");
    let status = there.command("status");
    assert!(status.contains("postcopy-paused") && status.contains("missing pages, for "), "{status}");
    assert!(there.ask("query-status")["ferry"]["waiting-ms"].as_u64().is_some());
    // Pages that exist nowhere else are not thrown away by the first signal.
    here.process.signal(Signal::TERM);
    here.process.stderr.wait_for("a second signal ends it at once");
    here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 })).unwrap();
    let (_, report) = lab.recover(&here, &there.address).succeeds();
    assert_eq!((report.recoveries, report.error), (1, None));
    here.ends_with(0);
    guest.checks_every_page();
    let refusal = there.refusal("migrate-pause", json!({}));
    assert!(refusal.contains("only a postcopy"), "{refusal}");
}

#[test]
fn a_link_cut_at_any_moment_leaves_one_runner_that_has_everything() {
    let lab = Lab::new();
    let disk = lab.disk(64 << 20);
    let hardware = Hardware { memory: "128M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=64M rate=3000 disk=on heartbeat=10");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    let (random, mut counts) = (RandomState::new(), [0; 3]);
    for round in 0..15u64 {
        let mode = ["auto", "postcopy", "precopy"][round as usize % 3];
        let mut there = lab.receive(Transport::Tcp);
        let link = Proxy::to(&there.address);
        let limits = ["--downtime", "300ms", "--max-bandwidth", "200M", "--postcopy-bandwidth", "50M"];
        let options = [&["--mode", mode, "--channels", "2", "--compression", "lz4"], &limits[..]].concat();
        let mut moving = lab.migrate(&here, &link.address, &options);
        let after = Duration::from_micros(random.hash_one(round) % 900_000);
        let over = moving.ends_within(after);
        link.cut();
        let ended = moving.end();
        println!("round {round}: {mode}, cut after {after:?}: {:?} {}", ended.end, ended.said.lines().last().unwrap_or_default());
        if ended.end == End::Status(0) {
            counts[0] += 1;
        } else if here.state() == "running" {
            counts[1] += 1;
            assert!(ended.said.contains("goes on at the source"), "{}", ended.said);
            guest.beats(3);
            let mut status = 1;
            if there.process.ends_within(Duration::from_secs(5)).is_none() {
                // Either it had said READY, and no word that the guest stayed has come through; or no HELLO has, and it waits on.
                if !there.process.stderr.text_so_far().contains("only the source knows") {
                    assert_eq!(there.ask("query-migrate"), json!({}));
                    status = 0;
                }
                there.command("quit");
            }
            there.ends_with(status);
            continue;
        } else {
            counts[2] += 1;
            assert!(!over);
            wait_for_pause(&here);
            let (_, report) = lab.recover(&here, &there.address).succeeds();
            assert_eq!(report.recoveries, 1);
        }
        here.ends_with(0);
        guest.moved_to(&mut there);
        guest.beats(3);
        here = there;
    }
    println!("arrived, stayed, recovered: {counts:?}");
    guest.checks_every_page();
}
