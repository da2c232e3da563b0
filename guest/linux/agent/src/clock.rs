//! Watches the clocks: monotonic time never goes back, on whichever CPU it is read.

use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use crate::report::{failure, MAX_GAP_US, TICK_GAP_US};
use crate::stop::stopping;

/// Between two looks at the clock.
const PERIOD: Duration = Duration::from_millis(1);
/// Looks on one CPU before the next one's turn comes.
const LOOKS_PER_CPU: u32 = 16;

/// Nanoseconds of a clock (`clock_gettime`).
fn nanoseconds(clock: libc::clockid_t) -> i64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid timespec for the call to fill in.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// CLOCK_MONOTONIC, in nanoseconds. `Instant` will not do: it hides steps back.
pub fn monotonic() -> i64 {
    nanoseconds(libc::CLOCK_MONOTONIC)
}

/// CLOCK_REALTIME, in nanoseconds since the epoch.
pub fn wall() -> i64 {
    nanoseconds(libc::CLOCK_REALTIME)
}

/// Moves this thread to one CPU.
fn pin(cpu: usize) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: CPU_SET ignores CPUs that the set has no room for.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: `set` is valid and of the size that is given; 0 is this thread.
    match unsafe { libc::sched_setaffinity(0, std::mem::size_of_val(&set), &set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Looks at the clock every millisecond, going round the CPUs, until asked to stop.
pub fn run() {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let mut last = monotonic();
    let mut last_instant = Instant::now();
    for look in 0_u32.. {
        if stopping() {
            return;
        }
        if look % LOOKS_PER_CPU == 0 {
            let cpu = (look / LOOKS_PER_CPU) as usize % cpus;
            if let Err(error) = pin(cpu) {
                failure("clock", &format!("cannot move to CPU {cpu}: {error}"));
                return;
            }
        }
        thread::sleep(PERIOD);
        let now = monotonic();
        if now < last {
            failure(
                "clock",
                &format!("CLOCK_MONOTONIC went back by {} ns", last - now),
            );
        }
        let gap = last_instant.elapsed().as_micros() as u64;
        TICK_GAP_US.fetch_max(gap, Relaxed);
        MAX_GAP_US.fetch_max(gap, Relaxed);
        last = now;
        last_instant = Instant::now();
    }
}
