//! How guests and Ferries end while somebody still needs them: in a postcopy, in a migration, behind a console that nobody reads.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ferry::qmp::client::Client;
use rustix::process::Signal;
use serde_json::json;

use super::after_commit::{HalfMoved, TRICKLE, half_moved};
use super::ferry::{Ferry, wait_for_migration, wait_until};
use super::lab::{Hardware, Lab, Transport};
use super::migration::Migration;
use super::output::LIMIT;
use super::pagestorm_kernel;
use super::process::End;
use super::puppet::Puppet;

/// Long enough for what must not happen to be seen.
const MOMENT: Duration = Duration::from_millis(200);
const QUIET: &str = "fill=64M rate=0 verify=0 heartbeat=20";

#[test]
fn a_first_signal_leaves_a_source_that_is_still_needed() {
    let lab = Lab::new();
    let HalfMoved { mut here, there, mut guest, migration } = half_moved(&lab, QUIET);
    here.process.signal(Signal::TERM);
    here.process
        .stderr
        .wait_for("its destination still needs pages from here; this ends when it has them; a second signal ends it at once");
    // The same on the console: Ctrl-A X, as often as one likes.
    for times in 1..=2 {
        here.process.types("\x01x");
        wait_until(&mut here.client(), "an answer to Ctrl-A X", |_| {
            here.process.stderr.text_so_far().matches("still needs pages from here").count() == 1 + times
        });
    }
    assert!(here.command_fails("quit").contains("still needs pages from here"));
    assert!(here.process.ends_within(Duration::ZERO).is_none());
    guest.beats(3);
    here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 })).unwrap();
    migration.succeeds();
    here.ends_with(0);
    guest.beats(3);
    assert_eq!(there.state(), "running");
}

#[test]
fn a_second_signal_ends_a_source_that_is_still_needed() {
    let lab = Lab::new();
    let HalfMoved { mut here, mut there, mut guest, migration } = half_moved(&lab, QUIET);
    here.process.signal(Signal::TERM);
    here.process.stderr.wait_for("a second signal ends it at once");
    here.process.signal(Signal::TERM);
    here.ends_with(1);
    let said = here.process.stderr.text_to_end();
    assert!(said.lines().last().is_some_and(|line| line.contains("while the destination still needed pages from here")), "{said}");
    migration.fails(&[]);
    there.process.stderr.wait_for("pages are missing");
    guest.beats(3);
}

#[test]
fn a_guest_that_waits_for_a_page_can_be_paused() {
    let lab = Lab::new();
    // It touches a page in a millisecond, most of which are not there yet.
    let HalfMoved { mut here, there, mut guest, migration } = half_moved(&lab, "fill=64M rate=1000 order=random heartbeat=20");
    here.process.signal(Signal::STOP);
    guest.falls_silent(MOMENT);
    let begin = Instant::now();
    // Ten seconds for the vCPUs and ten for the disks are the limit; the answer may be that it did not work.
    let answer = there.execute("stop", json!({}));
    assert!(begin.elapsed() < Duration::from_secs(25), "{answer:?}");
    println!("stop, while a vCPU waits for a page: {answer:?} after {:?}", begin.elapsed());
    assert_eq!(there.state(), if answer.is_ok() { "paused" } else { "running" });
    here.process.signal(Signal::CONT);
    there.execute("cont", json!({})).unwrap();
    guest.beats(3);
    here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 })).unwrap();
    migration.succeeds();
    here.ends_with(0);
    guest.checks_every_page();
}

/// A client of a Ferry whose guest is not waited for.
fn first_client(ferry: &mut Ferry) -> Client {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Ok(client) = Client::connect(&ferry.qmp) {
            return client;
        }
        assert!(Instant::now() < deadline && ferry.process.ends_within(Duration::from_millis(10)).is_none(), "no control socket");
    }
}

#[test]
fn a_console_that_nobody_reads_does_not_keep_ferry() {
    let lab = Lab::new();
    let hardware = Hardware { memory: "64M", cpus: 1, ..Hardware::default() };
    let mut ferry = lab.run(&hardware, "fill=1M heartbeat=1");
    let console = ferry.console();
    let room = console.narrow();
    wait_until(&mut first_client(&mut ferry), "the pipe is full", |_| console.unread() == room);
    ferry.ask("quit");
    ferry.ends_with(0);

    let path = lab.path("console");
    let serial = format!("unix:{}", path.display());
    let mut ferry = lab.run_with(pagestorm_kernel::path(), &hardware, "fill=1M heartbeat=1", &["--serial", &serial]);
    let mut control = first_client(&mut ferry);
    let deadline = Instant::now() + LIMIT;
    let mut console = UnixStream::connect(&path).unwrap();
    // Until nothing more fits: a moment later the client is given up, so that Ferry is asked to end before that.
    let (mut unread, mut since) = (0, Instant::now());
    while unread == 0 || since.elapsed() < MOMENT {
        assert!(Instant::now() < deadline, "{unread} bytes");
        let now = rustix::io::ioctl_fionread(&console).unwrap();
        if now != unread {
            (unread, since) = (now, Instant::now());
        }
        std::thread::yield_now();
    }
    super::ferry::execute(&mut control, "quit", json!({})).unwrap();
    ferry.ends_with(0);
    let mut heard = Vec::new();
    console.read_to_end(&mut heard).unwrap();
    assert_eq!(heard.len() as u64, unread);
}

/// A puppet half-way through a postcopy.
fn half_moved_puppet(lab: &Lab) -> (Ferry, Ferry, Puppet, Migration) {
    let (mut here, mut puppet) = Puppet::boot(lab);
    puppet.answers(&mut here);
    let mut there = lab.receive(Transport::Tcp);
    let mut client = here.client();
    let migration = lab.migrate(&here, &there.address, &TRICKLE);
    wait_for_migration(&mut client, "postcopy-active");
    puppet.moved_to(&mut there);
    puppet.answers(&mut there);
    (here, there, puppet, migration)
}

#[test]
fn a_guest_that_ends_before_its_pages_have_come_lets_its_source_go_first() {
    let lab = Lab::new();
    for letter in ["p", "r"] {
        let (mut here, mut there, mut puppet, migration) = half_moved_puppet(&lab);
        there.process.types(letter);
        assert_eq!(there.process.ends_within(MOMENT), None);
        assert_eq!((puppet.said(), here.state().as_str()), (String::new(), "finish-migrate"));
        here.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 })).unwrap();
        migration.succeeds();
        here.ends_with(0);
        if letter == "p" {
            there.ends_with(0);
        } else {
            puppet.says("b");
            puppet.answers(&mut there);
            assert_eq!(there.state(), "running");
        }
    }
}

#[test]
fn a_guest_that_ends_before_its_pages_have_come_ends_also_without_its_source() {
    let lab = Lab::new();
    for letter in ["p", "r"] {
        let (mut here, mut there, mut puppet, migration) = half_moved_puppet(&lab);
        there.process.types(letter);
        assert_eq!(there.process.ends_within(MOMENT), None);
        here.process.kill();
        migration.fails(&[]);
        let end = there.end();
        let said = there.process.stderr.text_to_end();
        assert!(said.contains("pages are missing"), "{said}");
        // Power-off is what the guest wanted; it cannot boot anew where pages of it are waited for.
        assert_eq!(end, End::Status(if letter == "p" { 0 } else { 1 }), "{said}");
        assert_eq!(said.contains("asked to restart"), letter == "r", "{said}");
        assert_eq!(puppet.said(), "");
    }
}

#[test]
fn a_guest_that_restarts_stays_and_moves_on_the_next_try() {
    let lab = Lab::new();
    let (mut here, mut puppet) = Puppet::boot(&lab);
    let mut there = lab.receive(Transport::Tcp);
    let mut client = here.client();
    let migration = lab.migrate(&here, &there.address, &["--mode", "precopy", "--max-bandwidth", "1M"]);
    wait_for_migration(&mut client, "active");
    here.process.types("r");
    migration.fails(&["the guest goes on at the source"]);
    there.ends_with(1);
    puppet.says("b");
    puppet.answers(&mut here);
    // At any moment: whichever comes first, the guest is in one place and answers there.
    for round in 0..6 {
        let mut there = lab.receive(Transport::Tcp);
        let mut migration = lab.migrate(&here, &there.address, &[]);
        migration.ends_within(Duration::from_millis(round * 15));
        here.process.types("r");
        let ended = migration.end();
        println!("round {round}: {:?}", ended.end);
        if ended.end == End::Status(0) {
            here.ends_with(0);
            // What was typed late is lost with the old console.
            assert!(["", "b"].contains(&puppet.said().as_str()));
            puppet.moved_to(&mut there);
            here = there;
        } else {
            assert!(ended.said.contains("the guest goes on at the source"), "{}", ended.said);
            assert_eq!(here.state(), "running");
            assert_eq!(there.console().text_so_far(), "");
        }
        puppet.answers_after_all(&mut here);
    }
}
