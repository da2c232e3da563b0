//! Page faults of a guest that has come before its pages: what is asked for in advance, and how long it waits.

use serde_json::json;

use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::ram;
use ferry::migrate::report::Faults;

const MEMORY: u64 = 256 << 20;
const FILLED_PAGES: u64 = (128 << 20) / 4096;

/// Moves a guest that writes its pages in this order, as fast as it can, while the background has little bandwidth.
fn faults_of(order: &str, bandwidth: &str, cpus: u32) -> Faults {
    let lab = Lab::new();
    // It looks at no other page than the one it writes.
    let workload = format!("fill=128M cpus={cpus} order={order} rate=max verify=0 heartbeat=20");
    let mut here = lab.run(&Hardware { memory: "256M", cpus, ..Hardware::default() }, &workload);
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(3);
    let mut there = lab.receive(Transport::Tcp);
    let options = ["--mode", "postcopy", "--postcopy-bandwidth", bandwidth];
    let (ended, report) = lab.migrate(&here, &there.address, &options).succeeds();
    here.ends_with(0);
    assert!(report.normal_pages >= FILLED_PAGES, "{report:?}");
    let faults = report.faults.expect("the page faults of a postcopy");
    for name in ["page faults", "  latency", "  prefetched", "  blocktime"] {
        assert!(ended.said.lines().any(|line| line.starts_with(name)), "the table has no {name}:\n{}", ended.said);
    }

    // The destination tells what it told the source.
    let answer = there.ask("query-migrate");
    assert_eq!(answer["ferry"]["progress"]["faults"], serde_json::to_value(&faults).unwrap());
    assert_eq!(answer["postcopy-latency"], json!(faults.latency_ns));
    assert_eq!(answer["postcopy-latency-dist"], json!(faults.latency_dist));
    assert_eq!(answer["postcopy-vcpu-blocktime"].as_array().map(Vec::len), Some(cpus as usize), "{answer}");
    assert!(faults.latency_dist.iter().sum::<u64>() >= faults.requested, "{faults:?}");
    assert!(faults.vcpu_blocktime_us.iter().all(|time| *time >= faults.blocktime_us), "{faults:?}");

    guest.moved_to(&mut there);
    guest.beats(3);
    there.ask("stop");
    guest.hear_all();
    assert!(ram::check(&there, &guest, MEMORY) >= FILLED_PAGES - 2);
    faults
}

#[test]
fn a_guest_that_goes_through_its_memory_in_order_faults_seldom() {
    let faults = faults_of("sequential", "4M", 1);
    assert!(faults.requested + faults.prefetched > FILLED_PAGES / 2, "most came in the background: {faults:?}");
    assert!(faults.requested < FILLED_PAGES / 10, "{faults:?}");
    assert!(faults.prefetch_used > faults.prefetched * 9 / 10, "{faults:?}");
}

#[test]
fn a_guest_without_order_is_not_charged_for_guesses() {
    let faults = faults_of("random", "64M", 2);
    assert!(faults.requested > 1000, "{faults:?}");
    assert!(faults.prefetched < 64 + faults.requested / 4, "{faults:?}");
}
