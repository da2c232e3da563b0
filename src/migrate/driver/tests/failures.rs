//! Migrations that fail: before the commit the guest goes on at the source, and a second try is as good as a first; after it the guest is
//! the destination's.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::guest::{self, Workload};
use super::hosts::{DestinationEvent, DestinationHost, LIMIT, SourceHost, assert_counts, request, slow};
use super::peers::{Peer, Until};
use super::relay::Relay;
use crate::migrate::driver::owner::SourceRequest;
use crate::migrate::report::{Mode, Status};
use crate::migrate::transport::Address;
use crate::migrate::{destination, source};

const CALM: Workload = Workload { pages: 64, pause: 2000 };

fn running() -> Arc<SourceHost> {
    let (vm, config) = guest::start(CALM, Vec::new());
    let source = SourceHost::new(vm, config, Vec::new());
    while guest::counter(&source.ram) <= CALM.pages {
        thread::yield_now();
    }
    source
}

/// The words with which a migration of a guest that goes on here ended.
fn not_moved(source: &SourceHost) -> String {
    let (outcome, moved) = source.outcome();
    assert!(matches!(outcome, source::Outcome::NotMoved(_)) && moved.is_none(), "{outcome:?}");
    source.assert_runs();
    outcome.report().error.clone().unwrap()
}

/// A second try brings everything over.
fn retry(source: &Arc<SourceHost>, mode: Mode) {
    let destination = DestinationHost::new();
    let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
    let _migration = source.migrate(request(&address, mode));
    let (outcome, moved) = source.outcome();
    assert!(matches!(outcome, source::Outcome::Completed(_)), "{outcome:?}");
    assert_eq!(destination.outcome(), destination::Outcome::Completed);
    assert_counts(&destination.ram());
    let arrived = destination.pause();
    guest::check(arrived.ram(), CALM);
    drop(moved);
}

#[test]
fn nobody_listens() {
    let source = running();
    let _migration = source.migrate(request(&"unix:/nonexistent/socket".parse().unwrap(), Mode::Auto));
    let error = not_moved(&source);
    assert!(error.contains("unix:/nonexistent/socket: No such file") && error.ends_with("the guest goes on at the source"), "{error}");
    let refused: Address = "tcp:127.0.0.1:1".parse().unwrap();
    let _migration = source.migrate(request(&refused, Mode::Auto));
    let error = not_moved(&source);
    assert!(error.contains("cannot connect to tcp:127.0.0.1:1: Connection refused"), "{error}");
}

#[test]
fn the_destination_refuses_in_its_own_words() {
    let source = running();
    let destination = DestinationHost::with(Vec::new(), |host| host.refuse = Some("there is no disk called root here".into()));
    let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
    let _migration = source.migrate(request(&address, Mode::Auto));
    let error = not_moved(&source);
    assert!(error.contains("the destination says: there is no disk called root here"), "{error}");
    assert!(matches!(destination.outcome(), destination::Outcome::Abandoned(reason) if reason.contains("no disk called root")));
    retry(&source, Mode::Precopy);
}

#[test]
fn the_destination_breaks_off_before_the_commit() {
    let source = running();
    for until in [Until::Hello, Until::Setup, Until::Prepared, Until::Switchover] {
        for mode in [Mode::Precopy, Mode::Postcopy] {
            let (peer, address) = Peer::new();
            let played = thread::spawn(move || peer.play(until));
            let _migration = source.migrate(request(&address, mode));
            let error = not_moved(&source);
            assert!(error.contains("the connection to the destination was lost"), "{until:?} {mode:?}: {error}");
            played.join().unwrap();
        }
    }
    retry(&source, Mode::Postcopy);
}

#[test]
fn the_destination_is_lost_after_the_commit() {
    for mode in [Mode::Precopy, Mode::Postcopy] {
        let source = running();
        let (peer, address) = Peer::new();
        let played = thread::spawn(move || peer.play(Until::Commit));
        let migration = source.migrate(request(&address, mode));
        let text = source.paused();
        played.join().unwrap();
        assert!(text.contains("does not run here again") && migration.is_paused(), "{text}");
        assert!(source.guest.lock().unwrap().is_none() && migration.is_committed());
        assert!(migration.cancel().unwrap_err().contains("belongs to the destination"));
        assert!(migration.start_postcopy().is_err());
    }
}

#[test]
fn the_source_cannot_stop_the_guest() {
    let (vm, config) = guest::start(CALM, Vec::new());
    let mut source = SourceHost::new(vm, config, Vec::new());
    Arc::get_mut(&mut source).unwrap().fail_take = true;
    let destination = DestinationHost::new();
    let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
    let _migration = source.migrate(request(&address, Mode::Postcopy));
    let error = not_moved(&source);
    assert!(error.contains("it will not stand still"), "{error}");
    assert!(matches!(destination.outcome(), destination::Outcome::Abandoned(_)));
}

#[test]
fn cancelled_while_throttled() {
    let source = running();
    let destination = DestinationHost::new();
    let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
    let migration = source.migrate(slow(1000, request(&address, Mode::Auto)));
    source.wait_for(Status::Active);
    let deadline = Instant::now() + LIMIT;
    while migration.progress().normal_pages == 0 {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    let begin = Instant::now();
    migration.cancel().unwrap();
    let error = not_moved(&source);
    assert!(begin.elapsed() < Duration::from_secs(5), "the cancel waited for the bandwidth limit");
    assert!(error.contains("cancelled") && migration.progress().status == Status::Cancelled, "{error}");
    assert!(matches!(destination.outcome(), destination::Outcome::Abandoned(reason) if reason.contains("cancelled")));
    retry(&source, Mode::Auto);
}

#[test]
fn cancelled_while_a_send_is_blocked() {
    let source = running();
    let (peer, address) = Peer::new();
    // It reads nothing once it is prepared, but stays.
    let (hold, held) = crossbeam_channel::bounded::<()>(0);
    let played = thread::spawn(move || peer.stall(&held));
    let migration = source.migrate(request(&address, Mode::Precopy));
    source.wait_for(Status::Active);
    let deadline = Instant::now() + LIMIT;
    // 22 MiB of pages do not fit into the buffers of a connection that nobody reads.
    let mut before = (0, Instant::now());
    while before.0 == 0 || before.1.elapsed() < Duration::from_millis(300) {
        assert!(Instant::now() < deadline);
        let sent = migration.progress().normal_pages;
        if sent != before.0 {
            before = (sent, Instant::now());
        }
        thread::yield_now();
    }
    migration.cancel().unwrap();
    not_moved(&source);
    drop(hold);
    played.join().unwrap();
    retry(&source, Mode::Precopy);
}

#[test]
fn a_person_starts_postcopy_in_a_slow_precopy() {
    let source = running();
    let destination = DestinationHost::new();
    let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
    let migration = source.migrate(slow(100_000, request(&address, Mode::Auto)));
    source.wait_for(Status::Active);
    migration.start_postcopy().unwrap();
    let (outcome, _moved) = source.outcome();
    assert!(matches!(&outcome, source::Outcome::Completed(report) if report.postcopy), "{outcome:?}");
    assert_eq!(destination.outcome(), destination::Outcome::Completed);
    guest::check(destination.pause().ram(), CALM);
}

#[test]
fn postcopy_is_refused_in_mode_precopy() {
    let source = running();
    let destination = DestinationHost::new();
    let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
    let migration = source.migrate(slow(1000, request(&address, Mode::Precopy)));
    assert!(migration.start_postcopy().unwrap_err().contains("precopy"));
    // Lifting the limit wakes a sender that has long to wait.
    migration.set_max_bandwidth(None);
    assert!(matches!(source.outcome().0, source::Outcome::Completed(_)));
    assert!(migration.start_postcopy().is_err());
}

#[test]
fn a_guest_that_cannot_run_is_still_the_destinations() {
    let source = running();
    let destination = DestinationHost::with(Vec::new(), |host| host.refuse_run = Some("its disk is locked".into()));
    let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
    let _migration = source.migrate(request(&address, Mode::Postcopy));
    let (outcome, _moved) = source.outcome();
    assert!(matches!(outcome, source::Outcome::Completed(_)));
    assert!(outcome.report().warnings.iter().any(|warning| warning.contains("its disk is locked")), "{outcome:?}");
    guest::check(destination.pause().ram(), CALM);
}

#[test]
fn the_link_is_cut_in_postcopy() {
    let source = running();
    let destination = DestinationHost::new();
    let (handle, address) = destination.listen("tcp:127.0.0.1:0");
    let relay = Relay::to(&address);
    // So slow that almost everything is missing when the link breaks, what the guest wants excepted.
    let migration =
        source.migrate(SourceRequest { max_postcopy_bandwidth: NonZeroU64::new(100_000), ..request(&relay.address, Mode::Postcopy) });
    assert!(matches!(destination.next(), DestinationEvent::Runs));
    let ram = destination.ram();
    // Once round and a little more: then it has all pages that it uses.
    let (left_off, deadline) = (guest::counter(&source.ram), Instant::now() + LIMIT);
    while guest::counter(&ram) < left_off + 2 * CALM.pages {
        assert!(Instant::now() < deadline, "the guest gets no further");
        thread::yield_now();
    }
    assert!(migration.progress().postcopy_requests > 0);
    relay.cut();
    assert!(source.paused().contains("after the commit") && migration.is_paused());
    let reason = destination.paused();
    assert!(reason.contains("connection"), "{reason}");
    assert!(handle.missing_pages() > 1000 && handle.status() == Status::PostcopyPaused);
    // All that it needs is there.
    assert_counts(&ram);
    // A page that is not is named, and whoever touches it waits.
    let lost = guest::STILL + 3001;
    let toucher = {
        let ram = ram.clone();
        thread::spawn(move || guest::number(&ram, lost))
    };
    let DestinationEvent::LostPage(text) = destination.next() else { panic!("the lost page was not named") };
    assert!(text.contains(&format!("page {lost:#x} (guest address {:#x})", lost << 12)), "{text}");
    assert!(!toucher.is_finished() && handle.waiting().0 == [crate::memory::PageNumber(lost)]);
    // A new link brings that page and all the others.
    migration.set_max_postcopy_bandwidth(None);
    migration.recover(address).unwrap();
    let (outcome, moved) = source.outcome();
    assert!(matches!(&outcome, source::Outcome::Completed(report) if report.recoveries == 1) && moved.is_some(), "{outcome:?}");
    assert_eq!(destination.outcome(), destination::Outcome::Completed);
    assert_eq!(toucher.join().unwrap(), guest::number(&source.ram, lost));
    guest::check(destination.pause().ram(), CALM);
}
