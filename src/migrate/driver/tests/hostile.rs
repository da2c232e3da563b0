//! Strangers at the destination: they are told to go, and a real source is still welcome.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use super::guest::{self, Workload};
use super::hosts::{DestinationHost, LIMIT, SourceHost, request};
use crate::memory::{HostPage, PageRun};
use crate::migrate::driver::destination::DestinationMigration;
use crate::migrate::report::Mode;
use crate::migrate::transport::Address;
use crate::migrate::wire::{Channel, Frame, Package, Setup, Totals};
use crate::migrate::{destination, source};

const CALM: Workload = Workload { pages: 64, pause: 2000 };

fn connect(address: &Address) -> TcpStream {
    let Address::Tcp { host, port } = address else { panic!("not a TCP address") };
    let stream = TcpStream::connect((host.as_str(), *port)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Sends `bytes`, and returns what comes back until the destination closes.
fn say(address: &Address, bytes: &[u8]) -> Vec<u8> {
    let mut stream = connect(address);
    // It may have closed before all was sent.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the destination neither answers nor closes: {error}"),
    }
    answer
}

fn hello(channel: Channel) -> Vec<u8> {
    source::Source::hello(99, 0, channel).encode().unwrap()
}

/// A choice from 0 to `bound`, the same in every run (splitmix64).
fn next(state: &mut u64, bound: u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ (mixed >> 31)) % bound
}

fn a_real_source_is_welcome(destination: &Arc<DestinationHost>, address: &Address) {
    let (vm, config) = guest::start(CALM, Vec::new());
    let source = SourceHost::new(vm, config, Vec::new());
    while guest::counter(&source.ram) <= CALM.pages {
        std::thread::yield_now();
    }
    let _migration = source.migrate(request(address, Mode::Postcopy));
    let (outcome, _moved) = source.outcome();
    assert!(matches!(outcome, source::Outcome::Completed(_)), "{outcome:?}");
    assert_eq!(destination.outcome(), destination::Outcome::Completed);
    guest::check(destination.pause().ram(), CALM);
}

#[test]
fn strangers_do_not_keep_a_real_source_away() {
    let destination = DestinationHost::new();
    let (_handle, address) = destination.listen("tcp:127.0.0.1:0");
    // One that says nothing, and stays.
    let silent = connect(&address);
    let valid = hello(Channel::Main);
    for end in 0..valid.len() {
        say(&address, &valid[..end]);
    }
    let answer = say(&address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(String::from_utf8_lossy(&answer).contains("unknown frame kind"), "{answer:?}");
    let answer = say(&address, &hello(Channel::Urgent));
    assert!(String::from_utf8_lossy(&answer).contains("belongs to no migration"), "{answer:?}");
    let mut state = 7;
    for _ in 0..200 {
        let mut bytes = valid.clone();
        // Header and magic; behind them other versions and sessions may be as good as ours.
        let at = next(&mut state, 24) as usize;
        bytes[at] ^= 1 + next(&mut state, 255) as u8;
        say(&address, &bytes);
    }
    a_real_source_is_welcome(&destination, &address);
    drop(silent);
}

/// The frames of a source, as far as one can make them up, in the order in which they come.
fn story() -> Vec<Vec<u8>> {
    let package =
        Package { sent: Totals::default(), postcopy: true, missing: vec![PageRun::new(0, 5)], bitmaps: vec![], machine: vec![1; 50] };
    let setup = Setup {
        ram_pages: 512,
        host_page: HostPage::SMALL,
        huge: vec![],
        postcopy: true,
        page_channels: 1,
        machine: vec![0; 30],
        disks: vec![],
    };
    [Frame::Setup(setup), Frame::PassEnd(Totals::default()), Frame::Switchover(package), Frame::Commit, Frame::End]
        .iter()
        .map(|frame| frame.encode().unwrap())
        .collect()
}

/// A session that a stranger began ends with an error, and never with a guest.
fn ends(bytes: &[u8]) -> String {
    let destination = DestinationHost::new();
    let (handle, address): (DestinationMigration, _) = destination.listen("tcp:127.0.0.1:0");
    say(&address, &[&hello(Channel::Main), bytes].concat());
    let outcome = destination.outcome();
    assert!(destination.guest.lock().unwrap().is_none() && handle.missing().0 == 0);
    match outcome {
        destination::Outcome::Abandoned(reason) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn sessions_cut_at_any_frame_end_with_a_reason() {
    let story = story();
    for frame in &story {
        assert!(!ends(frame).is_empty());
        assert!(!ends(&frame[..frame.len() / 2]).is_empty());
        assert!(!ends(&frame[..16.min(frame.len() - 1)]).is_empty());
    }
    assert!(ends(&story[0]).contains("configuration is not of version"), "a setup of nonsense is refused");
    let mut state = 11;
    for _ in 0..100 {
        let mut bytes = story[next(&mut state, story.len() as u64) as usize].clone();
        let at = next(&mut state, bytes.len() as u64) as usize;
        bytes[at] ^= 1 + next(&mut state, 255) as u8;
        assert!(!ends(&bytes).is_empty());
    }
}

#[test]
fn a_length_alone_allocates_nothing_and_is_not_waited_for() {
    let announces = |kind: u8, length: u32| {
        let mut header = vec![kind, 0, 0, 0];
        header.extend(length.to_le_bytes());
        header.extend([0; 8]);
        header
    };
    // A setup of 4 MiB is announced, and nothing of it comes.
    assert!(ends(&announces(4, 4 << 20)).contains("closed the connection"));
    // A package has no place before the guest's size is known: its body is not even waited for.
    assert!(ends(&announces(10, 256 << 20)).contains("out of place"));
}

#[test]
fn the_wait_can_be_given_up() {
    let destination = DestinationHost::new();
    let (handle, _) = destination.listen("tcp:127.0.0.1:0");
    handle.stop("nobody wants it any more").unwrap();
    let destination::Outcome::Abandoned(reason) = destination.outcome() else { panic!("something came") };
    assert_eq!(reason, "nobody wants it any more");
    assert!(destination.seen.recv_timeout(Duration::ZERO).is_err());
}
