//! Guests whose memory is made of hugetlb pages.

use ferry::memory::hugetlb::{COUNTS, Pool};

use serde_json::json;

use super::ferry::{Ferry, wait_for_migration, wait_until};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::ram;
use provision::Provision;

#[path = "../../src/memory/hugetlb/provision.rs"]
mod provision;

/// Bytes of a process's hugetlb memory that are populated.
fn populated(ferry: &Ferry) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", ferry.process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("HugetlbPages:")).unwrap().trim();
    line.strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn a_guest_runs_in_hugetlb_memory() {
    let _provision = Provision::new(64);
    let lab = Lab::new();
    let mut ferry = lab.run(&Hardware { memory: "128M,hugepages=2M,lock=on", cpus: 2, ..Hardware::default() }, "fill=64M rate=1000");
    let mut guest = Guest::booting_at(&mut ferry);
    guest.checks_every_page();
    assert_eq!(populated(&ferry), 128 << 20);
    ferry.command("quit");
    ferry.ends_with(0);
}

#[test]
fn too_few_huge_pages_are_an_error_at_the_start() {
    let lab = Lab::new();
    // More than fits a process, so that nobody else finds none meanwhile.
    let mut ferry = lab.run(&Hardware { memory: "128T,hugepages=2M", cpus: 1, ..Hardware::default() }, "");
    ferry.ends_with(1);
    let said = ferry.process.stderr.text_to_end();
    assert!(said.contains("cannot allocate 67108864 huge pages of 2 MiB") && said.contains("nr_hugepages` as root"), "{said}");
}

const HARDWARE: Hardware<'static> = Hardware { memory: "128M,hugepages=2M", cpus: 2, disk: None, readonly: false };

#[test]
fn a_guest_in_hugetlb_memory_moves_in_every_mode() {
    // At its source and at its destination.
    let _provision = Provision::new(2 * 64);
    let lab = Lab::new();
    let mut here = lab.run(&HARDWARE, "fill=64M rate=2000 order=random heartbeat=20");
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    for mode in ["precopy", "postcopy", "auto", "postcopy"] {
        let mut there = lab.receive(Transport::Tcp);
        let (_, report) = lab.migrate(&here, &there.address, &["--mode", mode, "--downtime", "500ms"]).succeeds();
        assert!(mode == "auto" || report.postcopy == (mode == "postcopy"), "{report:?}");
        here.ends_with(0);
        guest.moved_to(&mut there);
        guest.checks_every_page();
        // What the guest has never touched is populated in neither place.
        let populated = populated(&there);
        assert!((64 << 20..100 << 20).contains(&populated), "{populated}");
        here = there;
    }
    here.ask("stop");
    guest.hear_all();
    assert!(ram::check(&here, &guest, 128 << 20) >= (64 << 20) / 4096 - 2);
    here.command("quit");
    here.ends_with(0);
}

#[test]
fn a_dry_run_gives_its_memory_back_before_it_ends() {
    // There are as many as one source and one destination need.
    let _provision = Provision::only(2 * 64);
    let lab = Lab::new();
    let mut here = lab.run(&HARDWARE, "fill=64M rate=2000");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    let mut there = lab.receive(Transport::Tcp);
    for _ in 0..3 {
        lab.migrate(&here, &there.address, &["--dry-run"]).succeeds();
    }
    lab.migrate(&here, &there.address, &[]).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.checks_every_page();
}

#[test]
fn a_broken_link_costs_a_guest_in_hugetlb_memory_nothing() {
    let _provision = Provision::new(2 * 64);
    let lab = Lab::new();
    let mut here = lab.run(&HARDWARE, "fill=64M rate=2000 order=random heartbeat=20");
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    let mut there = lab.receive(Transport::Tcp);
    let mut client = here.client();
    let migration = lab.migrate(&here, &there.address, &["--mode", "postcopy", "--postcopy-bandwidth", "8M"]);
    wait_for_migration(&mut client, "postcopy-active");
    guest.moved_to(&mut there);
    guest.beats(2);
    there.ask("migrate-pause");
    migration.fails(&["`ferry recover` joins"]);
    wait_until(&mut client, "a pause at both sides", |_| [&here, &there].iter().all(|ferry| ferry.migration_status() == "postcopy-paused"));
    here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 })).unwrap();
    let (_, report) = lab.recover(&here, &there.address).succeeds();
    assert_eq!(report.recoveries, 1);
    here.ends_with(0);
    guest.checks_every_page();
    there.ask("stop");
    guest.hear_all();
    assert!(ram::check(&there, &guest, 128 << 20) >= (64 << 20) / 4096 - 2);
}

#[test]
fn a_destination_with_too_few_huge_pages_says_so_at_the_source() {
    let mut provision = Provision::only(64);
    let lab = Lab::new();
    let mut here = lab.run(&HARDWARE, "fill=16M rate=100");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    // Those that the guest has stay; a second guest finds none.
    provision.withdraw();
    let mut there = lab.receive(Transport::Unix);
    lab.migrate(&here, &there.address, &[]).fails(&["cannot allocate 64 huge pages of 2 MiB", "goes on at the source"]);
    there.ends_with(1);
    guest.beats(2);
}
