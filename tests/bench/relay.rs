//! A link with a round trip, on kernels with and without netem the same: `relay SOURCE DESTINATION MICROSECONDS BYTES_PER_SECOND`.
//!
//! Makes a TUN device `link0` in each of two network namespaces (paths of `setns`'s files), and carries packets between them until its
//! standard input ends: each waits until the line is free, takes the time that its bytes take, and half the round trip more; and up to
//! 50 us, the slack of the kernel's timers, which spares the host a wake-up for each packet. As in a router's queue, packets that would
//! wait longer than two round trips are dropped. What is between is real TCP.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write, stdin};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const NAME: &[u8] = b"link0";
/// Larger than any device's MTU.
const PACKET: usize = 65536;
/// A queue is at least so long, whatever the round trip.
const SHORTEST_QUEUE: Duration = Duration::from_millis(2);

/// A new TUN device in a network namespace; it is gone when the file is closed. This thread stays in the namespace.
fn device(namespace: &str) -> File {
    let namespace = File::open(namespace).expect("the network namespace");
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("entering the network namespace");
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun").expect("/dev/net/tun");
    // SAFETY: all of this structure may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(NAME) {
        *place = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the kernel reads and writes this structure, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    assert_eq!(result, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    file
}

/// One direction of the link.
struct Line {
    bytes_per_second: f64,
    delay: Duration,
    longest_wait: Duration,
    /// When the last packet's last byte has left.
    free_at: Instant,
    /// On their way, with the time at which they arrive.
    packets: VecDeque<(Instant, Vec<u8>)>,
}

impl Line {
    fn new(round_trip: Duration, bytes_per_second: f64) -> Self {
        let longest_wait = (2 * round_trip).max(SHORTEST_QUEUE);
        Line { bytes_per_second, delay: round_trip / 2, longest_wait, free_at: Instant::now(), packets: VecDeque::new() }
    }

    /// Takes what a device sends.
    fn take(&mut self, mut from: &File, buffer: &mut [u8]) {
        loop {
            let length = match from.read(buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // The device is not up yet, or no longer.
                Err(_) => return std::thread::sleep(Duration::from_millis(1)),
            };
            let now = Instant::now();
            let begins = self.free_at.max(now);
            if begins - now <= self.longest_wait {
                self.free_at = begins + Duration::from_secs_f64(length as f64 / self.bytes_per_second);
                self.packets.push_back((self.free_at + self.delay, buffer[..length].to_vec()));
            }
        }
    }

    /// Hands on what has arrived; returns when the next packet will have.
    fn deliver(&mut self, mut to: &File) -> Option<Instant> {
        while let Some((arrives, packet)) = self.packets.front() {
            if *arrives > Instant::now() {
                return Some(*arrives);
            }
            // A device that does not take it loses it, as cards do.
            let _ = to.write(packet);
            self.packets.pop_front();
        }
        None
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, destination, round_trip, rate] = &arguments[..] else {
        eprintln!("relay SOURCE DESTINATION MICROSECONDS BYTES_PER_SECOND");
        std::process::exit(2);
    };
    let round_trip = Duration::from_micros(round_trip.parse().expect("a round trip in microseconds"));
    let rate: f64 = rate.parse().expect("bytes a second");
    let (source, destination) = (device(source), device(destination));
    let (mut there, mut back) = (Line::new(round_trip, rate), Line::new(round_trip, rate));
    println!("ready");
    let mut buffer = vec![0; PACKET];
    let input = stdin();
    loop {
        let next = [there.deliver(&destination), back.deliver(&source)].into_iter().flatten().min();
        let timeout = next.map(|next| next.saturating_duration_since(Instant::now()).try_into().unwrap());
        let mut ready = [PollFd::new(&source, PollFlags::IN), PollFd::new(&destination, PollFlags::IN), PollFd::new(&input, PollFlags::IN)];
        poll(&mut ready, timeout.as_ref()).unwrap();
        let [from_source, from_destination, ended] = ready.map(|descriptor| !descriptor.revents().is_empty());
        if ended {
            return;
        }
        if from_source {
            there.take(&source, &mut buffer);
        }
        if from_destination {
            back.take(&destination, &mut buffer);
        }
    }
}
