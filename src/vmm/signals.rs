//! SIGTERM, SIGINT and SIGHUP as messages.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::thread;

use crossbeam_channel::{Receiver, unbounded};

/// Blocked signals and the thread that reads them.
pub(super) struct Signals {
    received: Receiver<()>,
}

impl Signals {
    /// Blocks the signals in this thread and all that it starts, and reads them from a descriptor (signalfd(2)).
    pub fn block() -> io::Result<Self> {
        let descriptor = signal_descriptor()?;
        let (sender, received) = unbounded();
        // Ends with the process: nothing wakes it before that.
        thread::Builder::new().name("signals".into()).spawn(move || {
            let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
            while matches!(rustix::io::read(&descriptor, &mut info), Ok(length) if length == info.len()) {
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

fn signal_descriptor() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before it is used, and the descriptor returned by signalfd is owned by nobody else.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        let error = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        let descriptor = libc::signalfd(-1, &set, libc::SFD_CLOEXEC);
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(descriptor))
    }
}
