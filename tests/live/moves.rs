//! Guests that move, and what they find there.

use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};

#[test]
fn a_busy_guest_moves_twenty_times() {
    let lab = Lab::new();
    let disk = lab.disk(64 << 20);
    let hardware = Hardware { memory: "256M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=160M rate=max disk=on disk_rate=1000 heartbeat=20");
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    for number in 0..20 {
        let (mode, transport) = (["auto", "precopy", "postcopy"][number % 3], [Transport::Tcp, Transport::Unix][number % 2]);
        let mut there = lab.receive(transport);
        // Precopy alone never catches up with this guest, so it is given a blackout that is long enough.
        let downtime = if mode == "precopy" { "10s" } else { "30ms" };
        let (_, report) = lab.migrate(&here, &there.address, &["--mode", mode, "--downtime", downtime]).succeeds();
        assert_eq!(report.postcopy, mode != "precopy", "{report:?}");
        here.ends_with(0);
        assert_eq!(there.state(), "running");
        assert!(!disk.is_free(), "nobody has locked the disk");
        guest.moved_to(&mut there);
        guest.checks_every_page();
        here = there;
    }
    here.ask("stop");
    guest.hear_all();
    let (written, _) = disk.snapshot().check(guest.fact("disk", "magic"));
    assert!(written > 0 && guest.disk_writes > 0);
    here.command("quit");
    here.ends_with(0);
    assert!(disk.is_free());
}
