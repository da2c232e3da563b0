//! What goes wrong before the commit: the guest goes on at the source, and a retry arrives exact.

use std::time::Duration;

use super::disk::TestDisk;
use super::ferry::{Ferry, wait_for_migration, wait_until};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};

const SLOW: [&str; 2] = ["--max-bandwidth", "8M"];

/// A guest that will see failures.
struct Patient<'a> {
    lab: &'a Lab,
    here: Ferry,
    guest: Guest,
}

impl<'a> Patient<'a> {
    fn new(lab: &'a Lab, disk: &TestDisk) -> Self {
        let hardware = Hardware { memory: "256M", cpus: 2, disk: Some(disk), ..Hardware::default() };
        let mut here = lab.run(&hardware, "fill=32M rate=10000 disk=on disk_rate=200 heartbeat=50");
        let mut guest = Guest::booting_at(&mut here);
        guest.checks_every_page();
        Patient { lab, here, guest }
    }

    /// The guest is at the source and works.
    fn goes_on(&mut self) {
        assert_eq!(self.here.state(), "running");
        self.guest.beats(3);
    }

    /// The retry.
    fn moves(&mut self, mode: &str) {
        let mut there = self.lab.receive(Transport::Tcp);
        self.lab.migrate(&self.here, &there.address, &["--mode", mode, "--max-bandwidth", "0"]).succeeds();
        self.here.ends_with(0);
        self.guest.moved_to(&mut there);
        self.guest.checks_every_page();
        self.here = there;
    }
}

#[test]
fn a_destination_that_is_not_there_or_refuses_disturbs_nothing() {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    let mut patient = Patient::new(&lab, &disk);

    let nobody = lab.path("nobody");
    let nobody = format!("unix:{}", nobody.display());
    for address in [nobody.as_str(), "tcp:127.0.0.1:1"] {
        lab.migrate(&patient.here, address, &[]).fails(&[address, "the guest goes on at the source"]);
        assert_eq!(patient.here.migration_status(), "failed");
        patient.goes_on();
    }

    let (absent, small) = (lab.path("absent"), lab.disk(1 << 20));
    let refusals = [
        (format!("id=root,path={}", absent.display()), vec!["root", "No such file"]),
        (format!("id=root,path={}", small.path.display()), vec!["disk root", "1048576 bytes here and 16777216 at the source"]),
        (format!("id=other,path={}", disk.path.display()), vec!["a disk \"other\"", "the guest has none"]),
    ];
    for (mapping, words) in refusals {
        let mut there = lab.receive_with(Transport::Tcp, &["--disk", &mapping]);
        let mut expected = vec!["the destination says", "the guest goes on at the source"];
        expected.extend(&words);
        lab.migrate(&patient.here, &there.address, &[]).fails(&expected);
        there.ends_with(1);
        let said = there.process.stderr.text_to_end();
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        patient.goes_on();
    }
    patient.moves("auto");
}

#[test]
fn a_cancelled_migration_disturbs_nothing() {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    let mut patient = Patient::new(&lab, &disk);
    for by_interrupt in [false, true] {
        let mut there = lab.receive(Transport::Unix);
        let mut client = patient.here.client();
        let migration = lab.migrate(&patient.here, &there.address, &SLOW);
        wait_for_migration(&mut client, "active");
        if by_interrupt {
            migration.interrupt();
        } else {
            patient.here.command("cancel");
        }
        migration.fails(&["the migration was cancelled", "the guest goes on at the source"]);
        assert_eq!(patient.here.migration_status(), "cancelled");
        there.ends_with(1);
        let said = there.process.stderr.text_to_end();
        assert!(said.contains("cancelled at the source"), "{said}");
        patient.goes_on();
        patient.moves(if by_interrupt { "postcopy" } else { "precopy" });
    }
}

#[test]
fn a_destination_killed_at_any_moment_of_precopy_is_survived() {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    let mut patient = Patient::new(&lab, &disk);
    // About four seconds of a first pass; its share of it that passes before the kill, in per cent.
    for share in [0, 3, 20, 55, 90] {
        let mut there = lab.receive(Transport::Tcp);
        let mut client = patient.here.client();
        let migration = lab.migrate(&patient.here, &there.address, &SLOW);
        wait_until(&mut client, "the share of the first pass", |client| {
            let answer = super::ferry::execute(client, "query-migrate", serde_json::json!({})).unwrap();
            let sent = answer["ram"]["normal"].as_u64().unwrap_or(0);
            sent * 100 >= share * 8192
        });
        there.process.kill();
        migration.fails(&["the guest goes on at the source"]);
        assert_eq!(patient.here.migration_status(), "failed");
        patient.goes_on();
    }
    patient.moves("auto");
}

#[test]
fn a_source_killed_before_the_commit_leaves_nothing_running() {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    let mut patient = Patient::new(&lab, &disk);
    let mut there = lab.receive(Transport::Tcp);
    let mut client = patient.here.client();
    let migration = lab.migrate(&patient.here, &there.address, &SLOW);
    wait_for_migration(&mut client, "active");
    patient.here.process.kill();
    migration.fails(&["the guest had not been handed over and ended with the source"]);
    there.ends_with(1);
    let said = there.process.stderr.text_to_end();
    assert!(said.contains("no guest was received") && said.contains("the connection to the source was lost"), "{said}");
    assert!(disk.is_free());
    let mut destination = Guest::booting_at(&mut there);
    destination.is_silent_for(Duration::ZERO);
}
