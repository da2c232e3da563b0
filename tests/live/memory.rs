//! What a guest's memory takes on its hosts, and in which pages.

use super::ferry::{Ferry, wait_until};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::ram::Resident;

const MIB: u64 = 1 << 20;
/// pagestorm's own code, tables and stacks, each in a huge page that it does not fill.
const KERNEL: u64 = 16 * MIB;

fn moved(lab: &Lab, here: &mut Ferry, guest: &mut Guest, mode: &str) -> Ferry {
    let mut there = lab.receive(Transport::Unix);
    lab.migrate(here, &there.address, &["--mode", mode, "--downtime", "1s"]).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.beats(3);
    there
}

#[test]
fn untouched_and_zero_memory_takes_nothing_at_the_destination() {
    for (fill, least) in [("fill=32M", 32 * MIB), ("fill=32M pattern=zero", 0)] {
        let lab = Lab::new();
        let hardware = Hardware { memory: "512M", cpus: 1, ..Hardware::default() };
        let mut here = lab.run(&hardware, &format!("{fill} rate=0 heartbeat=20"));
        let mut guest = Guest::booting_at(&mut here);
        guest.checks_every_page();
        for mode in ["precopy", "postcopy", "auto"] {
            here = moved(&lab, &mut here, &mut guest, mode);
            let there = Resident::of(&here);
            assert!((least..least + KERNEL).contains(&there.bytes), "{fill} by {mode}: {there:?}");
        }
    }
}

#[test]
fn transparent_huge_pages_are_whole_again_after_a_move() {
    let lab = Lab::new();
    let hardware = Hardware { memory: "256M", cpus: 2, ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=64M rate=2000 order=random heartbeat=20");
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    let before = Resident::of(&here);
    assert!(before.huge >= 48 * MIB, "this host makes no transparent huge pages, which `ferry doctor` knows how to change: {before:?}");
    for mode in ["precopy", "postcopy", "auto"] {
        here = moved(&lab, &mut here, &mut guest, mode);
        // A huge page that has a zero page in it, which was never sent, may be missing.
        wait_until(&mut here.client(), "huge pages", |_| Resident::of(&here).huge >= before.huge - 4 * MIB);
        let after = Resident::of(&here);
        assert!(after.bytes <= before.bytes + 4 * MIB, "{mode}: {before:?}, then {after:?}");
    }
    guest.checks_every_page();
}
