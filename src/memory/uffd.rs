//! Missing pages of guest RAM: userfaultfd reports who touches them, and they are placed whole (kernel document
//! admin-guide/mm/userfaultfd, UFFDIO_COPY(2const), UFFDIO_ZEROPAGE(2const)). Of hugetlb memory only whole huge pages are missing, placed and
//! discarded.

mod placing;
mod replace;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::ptr::NonNull;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::mm::{Advice, UserfaultfdFlags, madvise};
use rustix::process::Pid;
use thiserror::Error;
use userfaultfd::{Event, FeatureFlags, IoctlFlags, Uffd, UffdBuilder};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use placing::Placing;

use super::{GuestRam, HUGE_PAGE, HostPage, PAGE_SIZE, PageNumber, PageRun, thp};

/// Names the thread that faults; every kernel since Linux 4.14 does, and faults inside the kernel need a later one.
const FEATURES: FeatureFlags = FeatureFlags::THREAD_ID;

/// `struct uffdio_api` of linux/userfaultfd.h.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct UffdioZeropage {
    start: u64,
    len: u64,
    mode: u64,
    zeropage: i64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24);
const _: () = assert!(size_of::<UffdioCopy>() == 40);
const _: () = assert!(size_of::<UffdioZeropage>() == 32);

const UFFDIO: u8 = 0xaa;
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = rustix::ioctl::opcode::read_write::<UffdioApi>(UFFDIO, 0x3f) as libc::c_ulong;
// The userfaultfd crate has these two, but does not tell how far a partial UFFDIO_ZEROPAGE came.
const UFFDIO_COPY: libc::c_ulong = rustix::ioctl::opcode::read_write::<UffdioCopy>(UFFDIO, 0x03) as libc::c_ulong;
const UFFDIO_ZEROPAGE: libc::c_ulong = rustix::ioctl::opcode::read_write::<UffdioZeropage>(UFFDIO, 0x04) as libc::c_ulong;

/// Why missing pages cannot be served.
#[derive(Debug, Error)]
pub enum UffdError {
    /// No userfaultfd that sees KVM's accesses is to be had. Checked before a migration that may need one begins.
    #[error(
        "postcopy needs userfaultfd for kernel accesses, and this process may not use it: {0}; run as root, give this user access to \
         /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1"
    )]
    Unavailable(io::Error),
    /// Guest RAM could not be put under userfaultfd, or taken back.
    #[error("cannot {what} guest memory for postcopy: {source}")]
    Range {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Faults cannot be read.
    #[error("cannot read page faults: {0}")]
    Read(io::Error),
    /// A run reaches beyond RAM, is not made of whole host pages, or differs in length from its contents.
    #[error("{0} cannot be placed: beyond guest memory, with a part of a huge page, or with contents of another length")]
    BadRun(PageRun),
    /// A page could not be placed.
    #[error("cannot place {run}: {source}")]
    Place {
        /// The pages not yet placed.
        run: PageRun,
        /// What the kernel said: ENOENT if the range is not registered, ESRCH if the process is ending.
        source: io::Error,
    },
}

/// A touch of a missing page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The page; of a host page the first.
    pub page: PageNumber,
    /// The thread that waits for it, if the kernel says so. One of the kernel's own where it takes a vCPU's fault for it.
    pub thread: Option<Pid>,
}

/// A userfaultfd that watches nothing yet: proof that this host can do postcopy.
#[derive(Debug)]
pub struct Userfaultfd(Uffd);

impl Userfaultfd {
    /// Opens one that also reports faults taken inside the kernel, as KVM's and `preadv`'s are: first through /dev/userfaultfd, whose
    /// permissions an administrator can set, then by the system call.
    pub fn open() -> Result<Self, UffdError> {
        let mut builder = UffdBuilder::new();
        builder.close_on_exec(true).non_blocking(true).user_mode_only(false).require_features(FEATURES);
        match builder.create() {
            Ok(uffd) => Ok(Userfaultfd(uffd)),
            Err(userfaultfd::Error::OpenDevUserfaultfd(_)) => Self::from_system_call(),
            Err(error) => Err(UffdError::Unavailable(system_error(error))),
        }
    }

    /// The crate does not try the system call when the device is there but may not be opened.
    fn from_system_call() -> Result<Self, UffdError> {
        // SAFETY: the descriptor stays in this module, which manipulates nothing but guest RAM with it.
        let fd = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) };
        let fd = fd.map_err(|error| UffdError::Unavailable(error.into()))?;
        let mut api = UffdioApi { api: UFFD_API, features: FEATURES.bits(), ioctls: 0 };
        // SAFETY: the structure's size is asserted above.
        if unsafe { ioctl_with_mut_ref(&fd, UFFDIO_API, &mut api) } < 0 {
            return Err(UffdError::Unavailable(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is a userfaultfd and its ownership moves.
        Ok(Userfaultfd(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) }))
    }

    /// Puts all of `ram` under the watch: from now on a touch of a page that is not populated waits until the page is placed.
    pub fn register(self, ram: GuestRam) -> Result<MissingPages, UffdError> {
        let error = |source| UffdError::Range { what: "register", source };
        let (start, length) = (ram.base().as_ptr().cast(), ram.size() as usize);
        // A huge page that appeared after a discard would populate the discarded pages with zeros, so none may from here on.
        thp::forbid(&ram).map_err(|errno| error(errno.into()))?;
        let (zeros, zeropage) = match ram.host_page() {
            HostPage::SMALL => (Vec::new(), IoctlFlags::ZEROPAGE),
            // The kernel has no zero page of this size. Untouched, the zeros take no memory.
            host_page => (vec![0; PAGE_SIZE * host_page.pages() as usize], IoctlFlags::empty()),
        };
        let ioctls = self.0.register(start, length).map_err(|e| error(system_error(e)))?;
        if !ioctls.contains(IoctlFlags::COPY | IoctlFlags::WAKE | zeropage) {
            return Err(error(io::Error::from(io::ErrorKind::Unsupported)));
        }
        Ok(MissingPages { uffd: self.0, ram, zeros, can_replace: ioctls.bits() >> replace::MOVE & 1 == 1, placing: Placing::default() })
    }
}

/// Guest RAM whose missing pages are placed by hand. Every method may be called from any thread; dropping it lets faults through to
/// zero pages, so drop it only when nothing is missing or the guest is gone.
#[derive(Debug)]
pub struct MissingPages {
    uffd: Uffd,
    ram: GuestRam,
    /// A host page of zeros for memory that has no zero page, else nothing.
    zeros: Vec<u8>,
    /// Whether this kernel can do what [`MissingPages::replace`] needs.
    can_replace: bool,
    placing: Placing,
}

impl MissingPages {
    /// Waits for the next touch of a missing page, or until `stop` is readable (then `None`). The same page can come several times,
    /// once for every thread that touches it, and also when it was placed meanwhile.
    pub fn next_fault(&self, stop: impl AsFd) -> Result<Option<Fault>, UffdError> {
        loop {
            // First: most often there is none yet, and who serves the last one waits for this thread's processor.
            let mut fds = [PollFd::new(&self.uffd, PollFlags::IN), PollFd::new(&stop, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(UffdError::Read(errno.into())),
            }
            let stopped = !fds[1].revents().is_empty();
            match self.uffd.read_event() {
                Ok(Some(Event::Pagefault { addr, thread_id, .. })) => {
                    if let Some(page) = self.ram.page_at_host_address(addr as usize) {
                        let page = self.ram.host_page().around(PageRun::single(page)).first;
                        return Ok(Some(Fault { page, thread: Pid::from_raw(thread_id.as_raw()) }));
                    }
                }
                // No other event was asked for.
                Ok(Some(_)) => {}
                Ok(None) if stopped => return Ok(None),
                Ok(None) => {}
                Err(error) => return Err(UffdError::Read(system_error(error))),
            }
        }
    }

    /// Gives the missing pages of `run` the contents `bytes` and wakes who waits for them. A page that is there already keeps what it
    /// holds, because the guest may have written it since; its waiters are woken too. Returns how many pages were missing.
    pub fn place(&self, run: PageRun, bytes: &[u8]) -> Result<u64, UffdError> {
        if bytes.len() as u64 != run.bytes() {
            return Err(UffdError::BadRun(run));
        }
        let _placing = self.placing.shared(run);
        self.fill(run, |dst, offset, len| {
            let bytes = bytes.get(offset..offset + len as usize).unwrap_or_default();
            debug_assert_eq!(bytes.len() as u64, len, "the lengths were compared above");
            // SAFETY: all of `bytes`.
            unsafe { self.copy_from(dst, NonNull::from(bytes).cast(), bytes.len() as u64) }
        })
    }

    /// Like [`place`](Self::place) with zeros. Without reading any, where the kernel has a zero page to map; of hugetlb memory it takes as
    /// much as any other contents.
    pub fn place_zero(&self, run: PageRun) -> Result<u64, UffdError> {
        if !self.zeros.is_empty() {
            self.host_pages(run)?;
            let count = self.ram.host_page().pages();
            return (run.first.0..run.end()).step_by(count as usize).map(|first| self.place(PageRun::new(first, count), &self.zeros)).sum();
        }
        let _placing = self.placing.shared(run);
        self.fill(run, |start, _, len| {
            let mut argument = UffdioZeropage { start, len, mode: 0, zeropage: 0 };
            // SAFETY: as for UFFDIO_COPY.
            let result = unsafe { ioctl_with_mut_ref(&self.uffd, UFFDIO_ZEROPAGE, &mut argument) };
            (result, argument.zeropage)
        })
    }

    /// Wakes whoever waits for a page of `run` (whole host pages); who finds it still missing faults again.
    pub fn wake(&self, run: PageRun) -> Result<(), UffdError> {
        let start = self.host_pages(run)?;
        let woken = self.uffd.wake(start.as_ptr().cast(), run.bytes() as usize);
        woken.map_err(|error| UffdError::Range { what: "wake waiters of", source: system_error(error) })
    }

    /// Throws the contents of `run` away: its pages are missing from now on, those that were never populated included. Only while the
    /// guest stands still.
    pub fn discard(&self, run: PageRun) -> Result<(), UffdError> {
        let start = self.host_pages(run)?;
        // SAFETY: the range lies within guest RAM, to which nothing holds references.
        let discarded = unsafe { madvise(start.as_ptr().cast(), run.bytes() as usize, Advice::LinuxDontNeed) };
        discarded.map_err(|errno| UffdError::Range { what: "discard", source: errno.into() })
    }

    /// Ends the watch, when no page is missing any more: huge pages are welcome again. A missing page would read as zero.
    pub fn unregister(&self) -> Result<(), UffdError> {
        let (start, length) = (self.ram.base().as_ptr().cast(), self.ram.size() as usize);
        let gone = self.uffd.unregister(start, length);
        gone.map_err(|error| UffdError::Range { what: "unregister", source: system_error(error) })?;
        thp::allow(&self.ram);
        Ok(())
    }

    /// Host address of `run`, which must be made of whole host pages.
    fn host_pages(&self, run: PageRun) -> Result<NonNull<u8>, UffdError> {
        self.ram.host_address(run).filter(|_| self.ram.host_page().divides(run)).ok_or(UffdError::BadRun(run))
    }

    /// UFFDIO_COPY of `len` bytes at `from` to `dst`, a host address within guest RAM; the ioctl's result and the count it left.
    ///
    /// # Safety
    ///
    /// There are so many bytes, and nobody writes to them meanwhile.
    unsafe fn copy_from(&self, dst: u64, from: NonNull<u8>, len: u64) -> (i32, i64) {
        let mut argument = UffdioCopy { dst, src: from.as_ptr() as u64, len, mode: 0, copy: 0 };
        // SAFETY: the kernel reads the caller's bytes and nothing else. It writes pages of guest RAM, to which nothing holds references, and leaves
        // those alone that have contents; elsewhere it refuses to, because only guest RAM is registered.
        let result = unsafe { ioctl_with_mut_ref(&self.uffd, UFFDIO_COPY, &mut argument) };
        (result, argument.copy)
    }

    /// Fills the missing pages of `run` by `fill(host address, offset in the run, length)`, all in bytes, which returns the ioctl's
    /// result and the count it left in its argument. Returns how many pages it filled.
    fn fill(&self, run: PageRun, mut fill: impl FnMut(u64, usize, u64) -> (i32, i64)) -> Result<u64, UffdError> {
        let start = self.host_pages(run)?.as_ptr() as u64;
        let host_page = self.ram.host_page().pages();
        let mut done = 0;
        let mut present = 0;
        while done < run.count {
            let rest = PageRun::new(run.first.0 + done, run.count - done);
            // One call fills pages of one kernel mapping only (ENOENT), and `thp::allow_only` makes several of RAM, each of whole huge
            // pages. Advice that is alike again does not always join them: those that were touched meanwhile stay apart.
            let length = rest.count.min(HUGE_PAGE - rest.first.0 % HUGE_PAGE);
            let offset = done * PAGE_SIZE as u64;
            let (result, count) = fill(start + offset, offset as usize, length * PAGE_SIZE as u64);
            if result == 0 {
                done += length;
                continue;
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                // It came as far as `count` says. Not a page: the address space was changing, and the next try will do.
                Some(libc::EAGAIN) => done += u64::try_from(count).unwrap_or(0) / PAGE_SIZE as u64,
                Some(libc::EINTR) => {}
                // Someone else placed this page, and may have done so between a waiter's fault and its sleep: only a wake helps it.
                Some(libc::EEXIST) => {
                    self.wake(PageRun { first: rest.first, count: host_page })?;
                    present += host_page;
                    done += host_page;
                }
                _ => return Err(UffdError::Place { run: rest, source: error }),
            }
        }
        Ok(run.count - present)
    }
}

impl AsFd for MissingPages {
    /// Readable when a fault waits, for those who wait for other things as well.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

/// The system's error inside the crate's, which tells nothing more.
fn system_error(error: userfaultfd::Error) -> io::Error {
    use userfaultfd::Error::{CopyFailed, OpenDevUserfaultfd, SystemError, ZeropageFailed};
    match error {
        SystemError(errno) | CopyFailed(errno) | ZeropageFailed(errno) => io::Error::from_raw_os_error(errno as i32),
        OpenDevUserfaultfd(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests;
