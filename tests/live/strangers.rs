//! Strangers, garbage and broken links on the migration's socket.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use ferry::migrate::wire::{Channel, Frame, Hello, VERSION};

use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::output::LIMIT;

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Reads until the other end closes, which it must.
fn is_closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
    }
    answer
}

fn hello(channel: Channel) -> Vec<u8> {
    Frame::Hello(Hello { channel, session: 1, link: 0, program: "a test".into(), version: VERSION }).encode().unwrap()
}

#[test]
fn strangers_do_not_keep_a_guest_away() {
    let lab = Lab::new();
    let mut here = lab.run(&Hardware { memory: "256M", cpus: 1, ..Hardware::default() }, "fill=16M rate=2000");
    let mut guest = Guest::booting_at(&mut here);
    let mut there = lab.receive(Transport::Tcp);

    // Who says nothing, or half of it, and stays: more than are served at a time would be.
    let hello_of_main = hello(Channel::Main);
    let silent: Vec<TcpStream> = (0..8).map(|_| connect(&there.address)).collect();
    let mut half = connect(&there.address);
    half.write_all(&hello_of_main[..hello_of_main.len() / 2]).unwrap();

    let noise: Vec<u8> = (0..100_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let huge = [vec![1, 0, 0, 0, 255, 255, 255, 255], vec![0; 8]].concat();
    for bytes in [&noise[..], b"GET / HTTP/1.1\r\nHost: ferry\r\n\r\n", &[0; 64], &huge, &hello(Channel::Urgent)] {
        let mut stranger = connect(&there.address);
        // The other end may close before it has read everything.
        let _ = stranger.write_all(bytes);
        is_closed(&mut stranger);
        there.process.stderr.wait_for("refused a connection from 127.0.0.1");
        there.process.stderr.bytes.clear();
    }
    for bytes in [&[][..], &[1], &hello_of_main[..hello_of_main.len() - 1]] {
        let mut stranger = connect(&there.address);
        stranger.write_all(bytes).unwrap();
        stranger.shutdown(Shutdown::Write).unwrap();
        is_closed(&mut stranger);
    }
    assert_eq!(there.state(), "inmigrate");
    guest.beats(1);
    lab.migrate(&here, &there.address, &[]).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.checks_every_page();
    drop((silent, half));
}

#[test]
fn garbage_after_a_greeting_ends_the_wait_with_a_sentence() {
    let lab = Lab::new();
    let frames: [&[u8]; 4] =
        [&[0xff; 4096], &[4, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[6, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]];
    for garbage in frames {
        let mut there = lab.receive(Transport::Tcp);
        let mut stranger = connect(&there.address);
        stranger.write_all(&hello(Channel::Main)).unwrap();
        let _ = stranger.write_all(garbage);
        stranger.shutdown(Shutdown::Write).unwrap();
        is_closed(&mut stranger);
        there.ends_with(1);
        let said = there.process.stderr.text_to_end();
        assert!(said.contains("ferry: no guest was received: the "), "{said}");
    }
}

/// Passes connections on to `address` until the source has sent `limit` bytes over all of them, then cuts all.
struct Proxy {
    address: String,
    thread: JoinHandle<()>,
}

impl Proxy {
    fn cutting_after(limit: usize, address: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = format!("tcp:{}", listener.local_addr().unwrap());
        let address = address.to_string();
        let thread = std::thread::spawn(move || {
            let (cut, cutting) = std::sync::mpsc::channel();
            let sent = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
            let mut streams = Vec::new();
            // The main connection, and where it may come the urgent one. Whoever cuts connects once more to end the accepting.
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                if cutting.try_recv().is_ok() {
                    break;
                }
                let onward = connect(&address);
                streams.extend([stream.try_clone().unwrap(), onward.try_clone().unwrap()]);
                let (mut answers, mut answered) = (onward.try_clone().unwrap(), stream.try_clone().unwrap());
                std::thread::spawn(move || std::io::copy(&mut answers, &mut answered));
                let (sent, cut, own) = (sent.clone(), cut.clone(), listener.local_addr().unwrap());
                std::thread::spawn(move || {
                    if pass_on(stream, onward, &sent, limit) {
                        cut.send(()).unwrap();
                        let _ = TcpStream::connect(own);
                    }
                });
            }
            for stream in streams {
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        Proxy { address: own, thread }
    }
}

/// Passes bytes on; true when the limit was reached by this connection.
fn pass_on(mut from: TcpStream, mut to: TcpStream, sent: &std::sync::atomic::AtomicUsize, limit: usize) -> bool {
    let mut buffer = [0; 16384];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let before = sent.fetch_add(length, std::sync::atomic::Ordering::SeqCst);
        let rest = limit.saturating_sub(before).min(length);
        if to.write_all(&buffer[..rest]).is_err() {
            return false;
        }
        if rest < length {
            return before <= limit;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    false
}

#[test]
fn a_link_cut_anywhere_leaves_the_guest_in_one_place() {
    let lab = Lab::new();
    let mut here = lab.run(&Hardware { memory: "128M", cpus: 1, ..Hardware::default() }, "fill=16M rate=2000 heartbeat=10");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    let mut arrived = 0;
    // In the greeting, the setup, the first pass, and, in postcopy, before, in and after the package.
    let cuts = [("auto", 7), ("auto", 100), ("precopy", 1000), ("precopy", 5 << 20), ("auto", 12 << 20)];
    let late = [40_000, 60_000, 90_000, 150_000, 1 << 20, 9 << 20].map(|bytes| ("postcopy", bytes));
    for (mode, bytes) in cuts.into_iter().chain(late) {
        let mut there = lab.receive(Transport::Tcp);
        let proxy = Proxy::cutting_after(bytes, &there.address);
        let ended = lab.migrate(&here, &proxy.address, &["--mode", mode]).fails(&["the"]);
        proxy.thread.join().unwrap();
        if here.state() == "running" {
            assert!(ended.said.contains("the guest goes on at the source"), "{}", ended.said);
            guest.beats(3);
            if bytes > 100 {
                if there.process.ends_within(Duration::from_secs(10)).is_none() {
                    // READY was on its way; the word that the guest stayed could not come through the proxy any more.
                    there.process.stderr.wait_for("only the source knows whether the guest is to run here");
                    there.command("quit");
                }
                there.ends_with(1);
            }
            assert_eq!(there.console().text_so_far(), "");
            continue;
        }
        assert!(mode == "postcopy", "cut after {bytes} bytes in mode {mode}: {}", ended.said);
        assert!(ended.said.contains("does not run here again"), "{}", ended.said);
        assert_eq!(here.state(), "postmigrate");
        // A cut connection can lose what was sent last, the commit too: then the guest is nowhere, which is better than twice, until the
        // two are joined again.
        let said = there.process.stderr.wait_for("the connection to the source was lost");
        println!("cut after {bytes} bytes: {said}");
        let (_, report) = lab.recover(&here, &there.address).succeeds();
        assert_eq!(report.recoveries, 1);
        here.ends_with(0);
        guest.moved_to(&mut there);
        guest.beats(3);
        arrived += 1;
        here = there;
    }
    assert!(arrived > 0, "no cut came after the commit");
    guest.checks_every_page();
}
