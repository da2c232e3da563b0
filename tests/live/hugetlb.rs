//! Guests whose memory is made of hugetlb pages.

use ferry::memory::hugetlb::{COUNTS, Pool};

use super::ferry::Ferry;
use super::guest::Guest;
use super::lab::{Hardware, Lab};
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
    let mut ferry = lab.run(&Hardware { memory: "8T,hugepages=2M", cpus: 1, ..Hardware::default() }, "");
    ferry.ends_with(1);
    let said = ferry.process.stderr.text_to_end();
    assert!(said.contains("cannot allocate 4194304 huge pages of 2 MiB") && said.contains("nr_hugepages` as root"), "{said}");
}
