//! SIGTERM, SIGINT and SIGHUP as messages.

use std::io;
use std::thread;

use crossbeam_channel::{Receiver, unbounded};

/// Blocked signals and the thread that waits for them.
pub(super) struct Signals {
    received: Receiver<()>,
}

impl Signals {
    /// Blocks the signals in this thread and all that it starts, and waits for them in one of its own. By sigwait(3): who reads a signalfd is
    /// woken by every signal to any thread, and so by every kick of a vCPU.
    pub fn block() -> io::Result<Self> {
        let signals = blocked_signals()?;
        let (sender, received) = unbounded();
        // Ends with the process: nothing wakes it before that.
        thread::Builder::new().name("signals".into()).spawn(move || {
            let mut signal = 0;
            // SAFETY: both point to what is this thread's own.
            while unsafe { libc::sigwait(&raw const signals, &raw mut signal) } == 0 {
                if sender.send(()).is_err() {
                    break;
                }
            }
        })?;
        Ok(Signals { received })
    }

    /// One message for each signal.
    pub fn received(&self) -> &Receiver<()> {
        &self.received
    }
}

fn blocked_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: the set is initialised by sigemptyset before it is used.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
        match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
            0 => Ok(set),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}
