//! Migrations that fail: before the commit the guest goes on at the source, and a second try is as good as a first; after it the guest is
//! the destination's.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;

use super::guest::{self, Workload};
use super::hosts::{DestinationEvent, DestinationHost, Guest, LIMIT, SourceHost, assert_counts, request, slow};
use super::peers::{Peer, Until};
use super::relay::Relay;
use crate::block::disk::Disk;
use crate::migrate::driver::owner::SourceRequest;
use crate::migrate::report::{Mode, Status};
use crate::migrate::transport::Address;
use crate::migrate::{destination, source};
use crate::vm::config::DiskConfig;

const CALM: Workload = Workload { pages: 64, pause: 2000 };

/// Waits until the guest has written all of its pages.
fn goes_round(source: &SourceHost) {
    let deadline = Instant::now() + LIMIT;
    while guest::counter(&source.ram) <= CALM.pages {
        assert!(Instant::now() < deadline, "the guest gets no further");
        thread::yield_now();
    }
}

fn running() -> Arc<SourceHost> {
    let (vm, config) = guest::start(CALM, Vec::new());
    let source = SourceHost::new(vm, config, Vec::new());
    goes_round(&source);
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
fn a_disk_that_cannot_be_given_up_keeps_the_guest_here() {
    let directory = tempfile::tempdir().unwrap();
    let open = |id: &str| {
        let path = directory.path().join(id);
        let _ = std::fs::File::create_new(&path).map(|file| file.set_len(1 << 20).unwrap());
        Disk::open(DiskConfig { id: id.into(), path, readonly: false, options: Default::default() }).unwrap()
    };
    let ours = [open("first"), open("second")];
    ours.iter().for_each(|disk| disk.acquire().unwrap());
    let (vm, config) = guest::start(CALM, ours.iter().map(|disk| disk.config().clone()).collect());
    let source = SourceHost::new(vm, config, ours.to_vec());
    goes_round(&source);
    // The first is released by the time that the second turns out to be in use.
    let in_use = ours[1].io().unwrap();
    for mode in [Mode::Precopy, Mode::Postcopy] {
        let destination = DestinationHost::with(vec![open("first"), open("second")], |_| {});
        let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
        let _migration = source.migrate(request(&address, mode));
        let error = not_moved(&source);
        assert!(error.contains("disk second: its image is still in use") && error.ends_with("the guest goes on at the source"), "{error}");
        assert!(matches!(destination.outcome(), destination::Outcome::Abandoned(reason) if reason.contains("still in use")));
        for disk in &ours {
            assert!(disk.io().is_ok() && open(&disk.config().id).acquire().is_err(), "disk {} is not locked again", disk.config().id);
        }
    }
    drop(in_use);
    let theirs = [open("first"), open("second")];
    let destination = DestinationHost::with(theirs.to_vec(), |_| {});
    let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
    let _migration = source.migrate(request(&address, Mode::Auto));
    assert!(matches!(source.outcome().0, source::Outcome::Completed(_)));
    assert_eq!(destination.outcome(), destination::Outcome::Completed);
    assert!(theirs.iter().all(|disk| disk.io().is_ok()) && ours.iter().all(|disk| disk.io().is_err()), "the locks went along");
    guest::check(destination.pause().ram(), CALM);
}

#[test]
fn a_guest_that_restarts_behind_the_migration_s_back_stays() {
    let source = running();
    for mode in [Mode::Precopy, Mode::Postcopy] {
        let destination = DestinationHost::new();
        let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
        // It must not come to an end before the restart, and begins with the machine that was there then.
        let migration = source.migrate(slow(1000, request(&address, Mode::Auto)));
        source.wait_for(Status::Active);
        let mut guest = source.guest.lock().unwrap();
        let Some(Guest::Running(vm)) = guest.take() else { panic!("it does not run") };
        *guest = Some(Guest::Running(guest::restart(CALM, vm)));
        drop(guest);
        match mode {
            Mode::Precopy => migration.set_max_bandwidth(None),
            _ => migration.start_postcopy().unwrap(),
        }
        let error = not_moved(&source);
        assert!(error.contains("the guest has restarted in the meantime; try again"), "{error}");
        assert!(matches!(destination.outcome(), destination::Outcome::Abandoned(_)));
    }
    goes_round(&source);
    retry(&source, Mode::Auto);
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
fn cancelled_twice_while_the_destination_takes_its_time() {
    let source = running();
    // It answers the greeting, checks its host, builds the machine, loads the guest.
    for until in [Until::Hello, Until::Setup, Until::PassEnd, Until::Switchover] {
        let (peer, address) = Peer::new();
        let (hangs, hanging) = crossbeam_channel::bounded(1);
        let (hold, held) = crossbeam_channel::bounded::<()>(0);
        let played = thread::spawn(move || {
            let _connections = peer.play_on(until);
            hangs.send(()).unwrap();
            let _ = held.recv_timeout(LIMIT);
        });
        let migration = source.migrate(request(&address, Mode::Auto));
        hanging.recv_timeout(LIMIT).unwrap();
        migration.cancel().unwrap();
        migration.cancel().unwrap();
        let error = not_moved(&source);
        assert!(error.contains("the migration was cancelled"), "{until:?}: {error}");
        migration.cancel().unwrap();
        drop(hold);
        played.join().unwrap();
    }
    retry(&source, Mode::Auto);
}

#[test]
fn cancelled_while_connecting() {
    use socket2::{Domain, Socket, Type};
    let source = running();
    // Connections that nobody accepts fill the queue, and the next one is not answered.
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let socket = listener.local_addr().unwrap().as_socket().unwrap();
    let mut queued = Vec::new();
    while let Ok(connection) = std::net::TcpStream::connect_timeout(&socket, Duration::from_millis(500)) {
        queued.push(connection);
    }
    let address = format!("tcp:{socket}").parse().unwrap();
    let migration = source.migrate(request(&address, Mode::Auto));
    source.wait_for(Status::Setup);
    let begin = Instant::now();
    migration.cancel().unwrap();
    let error = not_moved(&source);
    assert!(error.contains("the migration was cancelled") && begin.elapsed() < Duration::from_secs(5), "{error}");
    retry(&source, Mode::Auto);
}

#[test]
fn cancelled_while_a_send_is_blocked() {
    let source = running();
    // The destination that reads again is told why, though the cancel came in the middle of a frame.
    for reads_again in [false, true] {
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
        let hold = (!reads_again).then_some(hold);
        let error = not_moved(&source);
        assert!(error.contains("the migration was cancelled"), "{error}");
        drop(hold);
        let told = played.join().unwrap();
        assert!(!reads_again || told.as_deref() == Some("the migration was cancelled at the source"), "{told:?}");
    }
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
    assert!(handle.missing().0 > 1000 && handle.status() == Status::PostcopyPaused);
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

#[test]
fn a_guest_that_ends_while_it_moves_is_the_cause_that_is_named() {
    let (events, happened) = unbounded();
    let (vm, config) = guest::start_with(CALM, Vec::new(), events);
    let source = SourceHost::new(vm, config, Vec::new());
    guest::crash(&source.ram);
    let event = happened.recv_timeout(LIMIT).unwrap();
    let expected = format!("the guest ended while it was being moved: {event}");
    assert!(expected.contains("vCPU 0 cannot go on"), "{expected}");
    // Its owner says so in the first pass, or it shows when the guest is to be saved.
    for owner_tells in [true, false] {
        let destination = DestinationHost::new();
        let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
        let migration = if owner_tells {
            let migration = source.migrate(slow(1000, request(&address, Mode::Precopy)));
            source.wait_for(Status::Active);
            migration.guest_ended(&event).unwrap();
            migration
        } else {
            source.migrate(request(&address, Mode::Postcopy))
        };
        let (outcome, _) = source.outcome();
        let report = outcome.report();
        assert_eq!((report.status, report.error.as_ref()), (Status::Failed, Some(&expected)));
        assert_eq!(migration.progress().error.as_ref(), Some(&expected));
        assert!(matches!(destination.outcome(), destination::Outcome::Abandoned(reason) if reason == expected));
    }
}

#[test]
fn a_guest_that_cannot_go_on_after_a_failed_switch_is_told_of() {
    let (vm, config) = guest::start(CALM, Vec::new());
    let mut source = SourceHost::new(vm, config, Vec::new());
    Arc::get_mut(&mut source).unwrap().fail_put_back = true;
    let (peer, address) = Peer::new();
    let played = thread::spawn(move || peer.play(Until::Switchover));
    let migration = source.migrate(request(&address, Mode::Postcopy));
    let (outcome, moved) = source.outcome();
    played.join().unwrap();
    assert!(matches!(outcome, source::Outcome::NotMoved(_)) && moved.is_none());
    let error = outcome.report().error.clone().unwrap();
    assert!(error.contains("the connection to the destination was lost"), "{error}");
    assert!(error.ends_with("; the guest stays paused at the source: its disk is gone"), "{error}");
    assert_eq!(migration.progress().error, Some(error));
}
