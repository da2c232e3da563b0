//! Ending another thread's wait, whatever it waits for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// A flag that wakes those who wait with it. Once raised it stays so; clones share it.
#[derive(Clone, Debug)]
pub struct Interrupt {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    raised: AtomicBool,
    event: OwnedFd,
}

impl Interrupt {
    /// An interrupt that is not raised. Fails where the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Interrupt { inner: Arc::new(Inner { raised: AtomicBool::new(false), event }) })
    }

    /// Ends all waits with this interrupt, now and from now on.
    pub fn raise(&self) {
        self.inner.raised.store(true, Ordering::Release);
        // Fails only when the counter is full, and then the descriptor is readable already.
        let _ = rustix::io::write(&self.inner.event, &1u64.to_ne_bytes());
    }

    /// Whether it was raised.
    pub fn is_raised(&self) -> bool {
        self.inner.raised.load(Ordering::Acquire)
    }

    /// Sleeps until `deadline`; returns false if it was raised before.
    pub fn sleep_until(&self, deadline: Instant) -> bool {
        while !self.is_raised() && Instant::now() < deadline {
            let timeout = time_left(Some(deadline));
            // An early return only makes it look again.
            let _ = poll(&mut [PollFd::new(self, PollFlags::IN)], timeout.as_ref());
        }
        !self.is_raised()
    }

    /// Waits until it is raised, `wake` was called, which uses the call up, or `deadline`.
    pub fn wait_for_wake(&self, wake: &Wake, deadline: Option<Instant>) -> io::Result<()> {
        self.wait_on(&mut [PollFd::new(self, PollFlags::IN), PollFd::new(wake, PollFlags::IN)], deadline)?;
        wake.take();
        Ok(())
    }

    /// Waits until `fd` is ready for `what` (or has failed, which the next operation on it tells).
    pub(super) fn wait_for(&self, fd: impl AsFd, what: PollFlags, deadline: Option<Instant>) -> io::Result<Wait> {
        self.wait_on(&mut [PollFd::new(self, PollFlags::IN), PollFd::new(&fd, what)], deadline)
    }

    /// Waits until `fd` is readable (or has failed), or `wake` was called.
    pub(super) fn wait_for_either(&self, fd: impl AsFd, wake: &Wake, deadline: Option<Instant>) -> io::Result<Wait> {
        let mut fds = [PollFd::new(self, PollFlags::IN), PollFd::new(&fd, PollFlags::IN), PollFd::new(&wake.0, PollFlags::IN)];
        self.wait_on(&mut fds, deadline)
    }

    fn wait_on(&self, fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<Wait> {
        wait_on(fds, deadline, || self.is_raised())
    }
}

/// Waits until `fd` is writable (or has failed), and nothing but the deadline ends the wait.
pub(super) fn wait_to_finish(fd: impl AsFd, deadline: Instant) -> io::Result<Wait> {
    wait_on(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(deadline), || false)
}

fn wait_on(fds: &mut [PollFd<'_>], deadline: Option<Instant>, interrupted: impl Fn() -> bool) -> io::Result<Wait> {
    loop {
        let timeout = time_left(deadline);
        return match poll(fds, timeout.as_ref()) {
            _ if interrupted() => Ok(Wait::Interrupted),
            Ok(0) if deadline.is_some_and(|deadline| deadline <= Instant::now()) => Ok(Wait::TimedOut),
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => Ok(Wait::Ready),
            Err(errno) => Err(errno.into()),
        };
    }
}

impl AsFd for Interrupt {
    /// Readable once it is raised.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }
}

/// Wakes one thread out of [`super::Reader::wait`], again and again; clones share it.
#[derive(Clone, Debug)]
pub struct Wake(Arc<OwnedFd>);

impl Wake {
    /// One that nobody has called yet. Fails where the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Wake(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Ends the wait under way, or the next one.
    pub fn wake(&self) {
        // Fails only when the counter is full, and then the descriptor is readable already.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Whether it was called since the last time somebody asked.
    pub fn take(&self) -> bool {
        rustix::io::read(&*self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Wake {
    /// Readable from a call until it is taken.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How a wait ended.
pub(super) enum Wait {
    Ready,
    TimedOut,
    Interrupted,
}

fn time_left(deadline: Option<Instant>) -> Option<Timespec> {
    // A time that does not fit is as good as none.
    deadline.and_then(|deadline| Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok())
}
