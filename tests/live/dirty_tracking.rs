//! Guests whose dirty pages KVM's rings tell; the log is what all other tests use.

use serde_json::json;

use super::ferry::{execute, wait_until};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::ram;

const RING: [&str; 2] = ["--dirty-tracking", "ring"];

#[test]
fn a_busy_guest_moves_by_ring_and_by_log_in_turns() {
    let lab = Lab::new();
    let disk = lab.disk(64 << 20);
    let hardware = Hardware { memory: "256M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let workload = "fill=160M rate=max order=random disk=on disk_rate=1000 heartbeat=20";
    let mut here = lab.run_with(super::pagestorm_kernel::path(), &hardware, workload, &RING);
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    for number in 0..9 {
        // Each host chooses for itself how the guest is tracked when it moves on.
        let tracking = if number == 4 { ["--dirty-tracking", "log"] } else { RING };
        let mut there = lab.receive_with([Transport::Tcp, Transport::Unix][number % 2], &tracking);
        let mode = ["auto", "precopy", "postcopy"][number % 3];
        let downtime = if mode == "precopy" { "10s" } else { "10ms" };
        lab.migrate(&here, &there.address, &["--mode", mode, "--downtime", downtime]).succeeds();
        here.ends_with(0);
        guest.moved_to(&mut there);
        guest.checks_every_page();
        here = there;
    }
    here.ask("stop");
    guest.hear_all();
    assert!(ram::check(&here, &guest, 256 << 20) >= (160 << 20) / 4096 - 2);
    let (written, _) = disk.snapshot().check(guest.fact("disk", "magic"));
    assert!(written > 0 && guest.disk_writes > 0);
}

/// The link is so slow that both vCPUs fill their rings again and again between two looks of the migration at them.
#[test]
fn full_rings_neither_stop_a_guest_nor_lose_its_pages() {
    let lab = Lab::new();
    let hardware = Hardware { memory: "256M", cpus: 2, ..Hardware::default() };
    let mut here = lab.run_with(super::pagestorm_kernel::path(), &hardware, "fill=160M rate=max order=random", &RING);
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    let mut there = lab.receive_with(Transport::Tcp, &RING);
    let mut client = here.client();
    let migration = lab.migrate(&here, &there.address, &["--mode", "precopy", "--max-bandwidth", "10M"]);
    wait_until(&mut client, "some pages", |client| {
        execute(client, "query-migrate", json!({})).unwrap()["ram"]["normal"].as_u64().is_some_and(|pages| pages > 5000)
    });
    guest.checks_every_page();
    here.command("cancel");
    migration.fails(&["cancelled"]);
    there.ends_with(1);
    // What was left in the rings neither stops the guest now nor is missed by the next migration.
    guest.checks_every_page();
    let mut there = lab.receive_with(Transport::Tcp, &RING);
    lab.migrate(&here, &there.address, &["--mode", "precopy", "--downtime", "10s"]).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.checks_every_page();
    there.ask("stop");
    guest.hear_all();
    assert!(ram::check(&there, &guest, 256 << 20) >= (160 << 20) / 4096 - 2);
}
