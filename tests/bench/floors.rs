//! What this host can do at best: the floors that `scripts/bench` measures in the same rounds as the migrations.
//!
//! - `floors tcp huge|small BYTES`: bytes over loopback TCP into fresh memory of huge or 4 KiB pages, one thread on each side. Prints
//!   seconds and the seconds of both processors.
//! - `floors link BYTES SOURCE DESTINATION ADDRESS`: the same from one network namespace to another one, where ADDRESS is.
//! - `floors postcopy BYTES RATE`: the same over loopback while somebody writes to RATE random pages a second of it, each of which comes over a second
//!   connection if it has not come yet. Prints also what part of these writes were made, and how long slow ones took, in milliseconds.
//! - `floors warm BYTES`: touches so much memory and holds it until its standard input ends. On a virtual machine free memory may have been
//!   given back to the host, and its first touch then costs ten times what it costs afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod postcopy_floor;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use rustix::time::{ClockId, clock_gettime};

/// What a migration sends at once.
const CHUNK: usize = 1 << 20;
const LOOPBACK: &str = "127.0.0.1";

/// Fresh memory of so many bytes, at an address that a huge page may have. It stays until the process ends.
fn memory(bytes: usize, advice: Advice) -> &'static mut [u8] {
    let length = bytes + (2 << 20);
    // SAFETY: a new mapping, which nothing else knows of and nothing unmaps.
    unsafe {
        let start = mmap_anonymous(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE).unwrap();
        madvise(start, length, advice).unwrap();
        let start = start.cast::<u8>();
        std::slice::from_raw_parts_mut(start.add(start.align_offset(2 << 20)), bytes)
    }
}

/// One byte in each page.
fn touch(memory: &mut [u8]) {
    memory.iter_mut().step_by(4096).enumerate().for_each(|(page, byte)| *byte = page as u8 | 1);
}

fn pin(processor: Option<usize>) {
    let Some(processor) = processor else { return };
    let mut set = rustix::thread::CpuSet::new();
    set.set(processor);
    // On a host with one processor both sides share it.
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// A socket belongs to the namespace that its thread was in when it was made.
fn enter(namespace: &str) {
    let namespace = File::open(namespace).expect("the network namespace");
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("entering the network namespace");
}

/// The ends of a connection: over loopback, or between namespaces.
fn connection(namespaces: Option<(&str, &str)>, address: &str) -> (TcpStream, TcpStream) {
    if let Some((_, destination)) = namespaces {
        enter(destination);
    }
    let listener = TcpListener::bind((address, 0)).unwrap();
    if let Some((source, _)) = namespaces {
        enter(source);
    }
    let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (sender, listener.accept().unwrap().0)
}

/// With `pinned` each side has a processor of its own; a link has more to do than two.
fn tcp(pages: Advice, bytes: usize, (mut sender, mut receiver): (TcpStream, TcpStream), pinned: bool) {
    let source = memory(bytes, Advice::LinuxHugepage);
    touch(source);
    let target = memory(bytes, pages);
    sender.set_nodelay(true).unwrap();
    let (began, cpu) = (Instant::now(), cpu_seconds());
    let sending = std::thread::spawn(move || {
        pin(pinned.then_some(1));
        source.chunks(CHUNK).for_each(|chunk| sender.write_all(chunk).unwrap());
    });
    pin(pinned.then_some(0));
    target.chunks_mut(CHUNK).for_each(|chunk| receiver.read_exact(chunk).unwrap());
    sending.join().unwrap();
    println!("{{\"seconds\": {:.6}, \"cpu_seconds\": {:.6}}}", began.elapsed().as_secs_f64(), cpu_seconds() - cpu);
}

fn postcopy(bytes: usize, rate: u64) {
    // A thread that fails would leave the others waiting for it.
    std::panic::set_hook(Box::new(|failure| {
        eprintln!("{failure}");
        std::process::exit(101);
    }));
    let source = memory(bytes, Advice::LinuxHugepage);
    touch(source);
    let connections = [connection(None, LOOPBACK), connection(None, LOOPBACK)];
    connections.iter().flat_map(|(sender, receiver)| [sender, receiver]).for_each(|end| end.set_nodelay(true).unwrap());
    let [bulk, urgent] = connections;
    let floor = postcopy_floor::run(source, rate, bulk, urgent);
    let slow = |part: f64| {
        floor.slow.get((floor.slow.len() as f64 * part) as usize).or(floor.slow.last()).map_or(0.0, |slow| slow.as_secs_f64() * 1e3)
    };
    println!(
        "{{\"seconds\": {:.6}, \"progress\": {:.3}, \"slow_count\": {}, \"slow_p50_ms\": {:.3}, \"slow_p99_ms\": {:.3}, \"slow_max_ms\": {:.3}}}",
        floor.seconds,
        floor.progress,
        floor.slow.len(),
        slow(0.5),
        slow(0.99),
        slow(1.0)
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let bytes = |text: &String| text.parse().expect("a number of bytes");
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["tcp", "huge", _] => tcp(Advice::LinuxHugepage, bytes(&arguments[2]), connection(None, LOOPBACK), true),
        ["tcp", "small", _] => tcp(Advice::LinuxNoHugepage, bytes(&arguments[2]), connection(None, LOOPBACK), true),
        ["link", _, source, destination, address] => {
            tcp(Advice::LinuxHugepage, bytes(&arguments[1]), connection(Some((source, destination)), address), false);
        }
        ["postcopy", _, rate] => postcopy(bytes(&arguments[1]), rate.parse().expect("a number of pages")),
        ["warm", _] => {
            touch(memory(bytes(&arguments[1]), Advice::LinuxHugepage));
            println!("touched");
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        }
        _ => panic!(
            "floors tcp huge|small BYTES | floors link BYTES SOURCE DESTINATION ADDRESS | floors postcopy BYTES RATE | floors warm BYTES"
        ),
    }
}
