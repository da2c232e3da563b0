//! Processors that stay awake while somebody waits for an answer. One that has nothing to do goes to sleep, and getting it out of that takes
//! 1 to 200 us, most where it is a virtual one itself: several times in each blackout, and three times for each page that a guest waits for.
//! The kernel lets idle processors poll instead while a process asks for wake-ups within 0 us (kernel document power/pm_qos_interface,
//! `/dev/cpu_dma_latency`), which root may do. Others do without.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};

/// Longest for one migration: polling costs power, and what runs beside it on a core some speed. Most of what a guest waits for in postcopy
/// it has asked for by then.
pub const MOST: Duration = Duration::from_secs(10);

/// In which a switch follows that may be the next thing to come, if it is.
pub const SWITCH: Duration = Duration::from_millis(50);

/// Keeps the processors of this host awake, until it is dropped at the latest.
#[derive(Default)]
pub struct Awake(Option<Request>);

/// A thread holds the request, and looks again when it should be over: whoever wants it longer need not wake anybody.
struct Request {
    until: Arc<Mutex<Instant>>,
    _end: Sender<()>,
}

impl Awake {
    /// Keeps them awake for `time` from now on. Does nothing where that cannot be.
    pub fn during(&mut self, time: Duration) {
        let until = Instant::now() + time;
        if !self.0.as_ref().is_some_and(|request| request.extend(until)) {
            self.0 = Request::begin(until).ok();
        }
    }

    /// Lets them sleep again.
    pub fn end(&mut self) {
        self.0 = None;
    }
}

impl Request {
    fn begin(until: Instant) -> std::io::Result<Self> {
        let mut device = File::options().write(true).open("/dev/cpu_dma_latency")?;
        device.write_all(&0i32.to_ne_bytes())?;
        let (end, ended) = bounded::<()>(0);
        let until = Arc::new(Mutex::new(until));
        let its = until.clone();
        let hold = move || {
            // The request lasts until the file is closed.
            let _device = device;
            loop {
                let until = *lock(&its);
                // Once it is over `extend` knows, too: there is no way back.
                if until <= Instant::now() || ended.recv_deadline(until) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("migration-awake".into()).spawn(hold)?;
        Ok(Request { until, _end: end })
    }

    /// False if it is over.
    fn extend(&self, until: Instant) -> bool {
        let mut current = lock(&self.until);
        let holds = *current > Instant::now();
        *current = until;
        holds
    }
}

fn lock(until: &Mutex<Instant>) -> MutexGuard<'_, Instant> {
    until.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_request_is_made_and_can_be_made_longer_until_it_is_over() {
        let mut awake = Awake::default();
        awake.during(Duration::from_secs(60));
        let Some(request) = &awake.0 else {
            // Only root may ask, and whoever may not goes without.
            assert!(File::options().write(true).open("/dev/cpu_dma_latency").is_err());
            return;
        };
        // The kernel tells the least that anybody asks for.
        let mut least = [0xff; 4];
        File::open("/dev/cpu_dma_latency").unwrap().read_exact(&mut least).unwrap();
        assert_eq!(i32::from_ne_bytes(least), 0);
        assert!(request.extend(Instant::now() + Duration::from_secs(60)));
        assert!(request.extend(Instant::now()));
        assert!(!request.extend(Instant::now() + Duration::from_secs(60)), "it was over");
        awake.end();
        assert!(awake.0.is_none());
    }
}
