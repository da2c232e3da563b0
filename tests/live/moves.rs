//! Guests that move, and what they find there.

use std::time::Duration;

use super::ferry::{Ferry, wait_until};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::ram;

#[test]
fn a_busy_guest_moves_twenty_times() {
    let lab = Lab::new();
    let disk = lab.disk(64 << 20);
    let hardware = Hardware { memory: "256M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=160M rate=max order=random disk=on disk_rate=1000 heartbeat=20");
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    for number in 0..20 {
        let (mode, transport) = (["auto", "precopy", "postcopy"][number % 3], [Transport::Tcp, Transport::Unix][number % 2]);
        let mut there = lab.receive(transport);
        // Precopy alone never catches up with this guest, so it is given a blackout that is long enough.
        let downtime = if mode == "precopy" { "10s" } else { "10ms" };
        let (_, report) = lab.migrate(&here, &there.address, &["--mode", mode, "--downtime", downtime]).succeeds();
        assert!(mode == "auto" || report.postcopy == (mode == "postcopy"), "{report:?}");
        here.ends_with(0);
        assert_eq!(there.state(), "running");
        assert!(!disk.is_free(), "nobody has locked the disk");
        guest.moved_to(&mut there);
        guest.checks_every_page();
        here = there;
    }
    here.ask("stop");
    guest.hear_all();
    assert!(ram::check(&here, &guest, 256 << 20) >= (160 << 20) / 4096 - 2);
    let (written, _) = disk.snapshot().check(guest.fact("disk", "magic"));
    assert!(written > 0 && guest.disk_writes > 0);
    here.command("quit");
    here.ends_with(0);
    assert!(disk.is_free());
}

#[test]
fn a_guest_moves_on_the_moment_it_has_arrived() {
    let lab = Lab::new();
    let disk = lab.disk(64 << 20);
    let hardware = Hardware { memory: "128M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=64M rate=20000 order=random disk=on heartbeat=20");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    // All of them wait from the beginning, so that nothing comes between two moves.
    let hosts: Vec<_> = (0..12).map(|number| lab.receive([Transport::Tcp, Transport::Unix][number % 2])).collect();
    let mut left = Vec::new();
    for (number, mut there) in hosts.into_iter().enumerate() {
        let mode = ["postcopy", "auto", "precopy"][number % 3];
        lab.migrate(&here, &there.address, &["--mode", mode, "--downtime", "1s"]).succeeds();
        guest.moved_to(&mut there);
        left.push(std::mem::replace(&mut here, there));
    }
    guest.checks_every_page();
    guest.writes_blocks(20);
    left.iter_mut().for_each(|ferry| ferry.ends_with(0));
}

#[test]
fn an_idle_guest_with_little_in_it_moves() {
    let lab = Lab::new();
    let mut here = lab.run(&Hardware { memory: "256M", cpus: 1, ..Hardware::default() }, "fill=32M pattern=zero rate=0");
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    for mode in ["precopy", "postcopy", "auto"] {
        let mut there = lab.receive(Transport::Unix);
        let (_, report) = lab.migrate(&here, &there.address, &["--mode", mode]).succeeds();
        here.ends_with(0);
        // Nothing is sent of what is zero: there is little more than the kernel.
        assert!(report.normal_pages < 1000, "{report:?}");
        guest.moved_to(&mut there);
        guest.checks_every_page();
        here = there;
    }
}

#[test]
fn locked_memory_is_locked_again_when_all_of_it_has_come() {
    let locked = |ferry: &Ferry| -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", ferry.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap().trim();
        line.strip_suffix(" kB").unwrap().parse().unwrap()
    };
    let lab = Lab::new();
    let mut here = lab.run(&Hardware { memory: "64M,lock=on", cpus: 1, ..Hardware::default() }, "fill=16M rate=1000");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    assert_eq!(locked(&here), 64 << 10);
    for mode in ["postcopy", "precopy"] {
        let mut there = lab.receive(Transport::Unix);
        lab.migrate(&here, &there.address, &["--mode", mode]).succeeds();
        here.ends_with(0);
        guest.moved_to(&mut there);
        wait_until(&mut there.client(), "locked memory", |_| locked(&there) == 64 << 10);
        guest.checks_every_page();
        here = there;
    }
}

#[test]
fn a_guest_with_memory_on_both_sides_of_the_hole_moves() {
    let lab = Lab::new();
    // All of what lies above 4 GiB, because pagestorm fills from the top of the low part on, and some below.
    let mut here = lab.run(&Hardware { memory: "3200M", cpus: 2, ..Hardware::default() }, "fill=all pattern=zero rate=2000 order=random");
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    assert!(guest.facts.iter().any(|fact| fact.starts_with("pagestorm: segment") && fact.contains("gpa=0x100000000")), "{:?}", guest.facts);
    for mode in ["auto", "postcopy", "precopy"] {
        let mut there = lab.receive(Transport::Tcp);
        lab.migrate(&here, &there.address, &["--mode", mode]).succeeds();
        here.ends_with(0);
        guest.moved_to(&mut there);
        guest.beats(3);
        here = there;
    }
    guest.checks_every_page();
    here.ask("stop");
    guest.hear_all();
    ram::check(&here, &guest, 3200 << 20);
}

#[test]
fn a_paused_guest_moves_and_stays_paused() {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    let hardware = Hardware { memory: "256M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=32M rate=10000 disk=on heartbeat=20");
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    for mode in ["auto", "precopy", "postcopy"] {
        here.command("pause");
        assert_eq!(here.state(), "paused");
        let mut there = lab.receive(Transport::Tcp);
        lab.migrate(&here, &there.address, &["--mode", mode]).succeeds();
        here.ends_with(0);
        assert_eq!(there.state(), "paused");
        guest.moved_to(&mut there);
        guest.is_silent_for(Duration::from_millis(300));
        there.command("resume");
        assert!(!disk.is_free());
        guest.checks_every_page();
        here = there;
    }
}

#[test]
fn a_guest_that_arrives_paused_owns_its_disk() {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    let hardware = Hardware { memory: "64M", cpus: 1, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=8M disk=on");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    for mode in ["precopy", "postcopy"] {
        here.command("pause");
        let mut there = lab.receive(Transport::Unix);
        lab.migrate(&here, &there.address, &["--mode", mode]).succeeds();
        here.ends_with(0);
        guest.moved_to(&mut there);
        assert_eq!(there.state(), "paused");
        let mut second = lab.run(&hardware, "");
        second.ends_with(1);
        let said = second.process.stderr.text_to_end();
        assert!(said.contains(&format!("disk image {} is in use by another runner", disk.path.display())), "{said}");
        there.command("resume");
        guest.writes_blocks(1);
        here = there;
    }
    here.command("pause");
    here.command("quit");
    here.ends_with(0);
    assert!(disk.is_free());
}

#[test]
fn a_guest_with_a_read_only_disk_moves_to_another_path() {
    let lab = Lab::new();
    let (disk, copy) = (lab.disk(16 << 20), lab.disk(16 << 20));
    let hardware = Hardware { memory: "256M", cpus: 1, disk: Some(&disk), readonly: true };
    let mut here = lab.run(&hardware, "fill=8M");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    let mapping = format!("id=root,path={}", copy.path.display());
    let mut there = lab.receive_with(Transport::Unix, &["--disk", &mapping]);
    lab.migrate(&here, &there.address, &[]).succeeds();
    here.ends_with(0);
    let block = &there.ask("query-block")[0];
    assert_eq!((&block["device"], &block["inserted"]["ro"]), (&"root".into(), &true.into()), "{block}");
    assert_eq!(block["inserted"]["file"], copy.path.to_str().unwrap(), "{block}");
    guest.moved_to(&mut there);
    guest.checks_every_page();
}

#[test]
fn a_guest_that_has_moved_powers_off() {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    let hardware = Hardware { memory: "256M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=16M rate=5000 disk=on disk_rate=500 run=8");
    let mut guest = Guest::booting_at(&mut here);
    guest.writes_blocks(100);
    let mut there = lab.receive(Transport::Tcp);
    lab.migrate(&here, &there.address, &[]).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.finishes();
    there.ends_with(0);
    let (written, digest) = disk.snapshot().check(guest.fact("disk", "magic"));
    assert_eq!((written, digest), (guest.fact("disk", "data_blocks"), guest.fact("disk", "digest")));
    assert!(disk.is_free());
}
