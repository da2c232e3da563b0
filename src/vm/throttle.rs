//! Slowing a guest down: of every window of time all its vCPUs stand still for a share. A vCPU that finds itself in that share waits; one
//! that is in the guest when it begins is kicked out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};

/// Short against what people and timeouts in the guest notice, long against a kick.
const WINDOW: Duration = Duration::from_millis(10);
/// A vCPU always runs for some of the time.
const MAX_PERCENT: u8 = 99;

/// When a guest's vCPUs are to stand still.
pub struct Throttle {
    began: Instant,
    percent: AtomicU8,
}

impl Throttle {
    /// Never.
    pub fn new() -> Self {
        Throttle { began: Instant::now(), percent: AtomicU8::new(0) }
    }

    /// How long a vCPU is to wait before it enters the guest now.
    pub fn wait(&self) -> Duration {
        match self.percent.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            percent => wait_at(self.began.elapsed(), percent),
        }
    }

    /// How long it is until the next time at which vCPUs are to leave the guest.
    fn until_next(&self) -> Duration {
        until_next_at(self.began.elapsed(), self.percent.load(Ordering::Relaxed))
    }
}

/// The time within the window, and how much of the window vCPUs run.
fn place(time: Duration, percent: u8) -> (Duration, Duration) {
    let within = Duration::from_nanos((time.as_nanos() % WINDOW.as_nanos()) as u64);
    (within, WINDOW * u32::from(100 - percent.min(MAX_PERCENT)) / 100)
}

fn wait_at(time: Duration, percent: u8) -> Duration {
    let (within, share) = place(time, percent);
    if within < share { Duration::ZERO } else { WINDOW - within }
}

fn until_next_at(time: Duration, percent: u8) -> Duration {
    let (within, share) = place(time, percent);
    if within < share { share - within } else { WINDOW - within + share }
}

/// A thread that kicks vCPUs out of the guest whenever they are to leave it. Ends, and lets the vCPUs run, when it is dropped.
pub struct Throttler {
    throttle: Arc<Throttle>,
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Throttler {
    /// Begins to call `kick` in time; nobody stands still before [`Throttler::set`].
    pub fn start(throttle: Arc<Throttle>, kick: impl Fn() + Send + 'static) -> std::io::Result<Self> {
        let (end, ended) = bounded::<()>(0);
        let theirs = throttle.clone();
        let thread = std::thread::Builder::new().name("throttle".into()).spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(theirs.until_next()) {
                kick();
            }
        })?;
        Ok(Throttler { throttle, end: Some(end), thread: Some(thread) })
    }

    /// The vCPUs stand still for `percent` of the time from now on, at most 99.
    pub fn set(&self, percent: u8) {
        self.throttle.percent.store(percent.min(MAX_PERCENT), Ordering::Relaxed);
    }
}

impl Drop for Throttler {
    fn drop(&mut self) {
        self.set(0);
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed when it happened.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_stand_still_at_the_end_of_each_window() {
        let at = |milliseconds| Duration::from_millis(milliseconds);
        // Of 10 ms they run for 7.
        for (time, wait, next) in [(0, 0, 7), (6, 0, 1), (7, 3, 10), (9, 1, 8), (10, 0, 7), (38, 2, 9)] {
            assert_eq!((wait_at(at(time), 30), until_next_at(at(time), 30)), (at(wait), at(next)), "{time} ms");
        }
        assert_eq!(wait_at(Duration::from_micros(99), 255), Duration::ZERO);
        assert_eq!(wait_at(Duration::from_micros(100), 255), Duration::from_micros(9900));
    }
}
