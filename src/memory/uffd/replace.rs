//! Whole huge pages put in place at once: UFFDIO_MOVE (Linux 6.8) takes one from where it came together and gives it to the guest, without
//! a copy, as a huge page.

use std::ptr::NonNull;
use std::time::Duration;

use rustix::mm::{Advice, MremapFlags, madvise, mremap_fixed};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::{MissingPages, UFFDIO, UffdError};
use crate::memory::staging::StagingArea;
use crate::memory::{HostPage, PAGE_SIZE, PageRun};

/// `struct uffdio_move` of linux/userfaultfd.h.
#[repr(C)]
struct UffdioMove {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

const _: () = assert!(size_of::<UffdioMove>() == 40);

/// Number of the ioctl, and of its bit in what a registration offers.
pub(super) const MOVE: u8 = 0x05;
const UFFDIO_MOVE: libc::c_ulong = rustix::ioctl::opcode::read_write::<UffdioMove>(UFFDIO, MOVE) as libc::c_ulong;

/// How long memory is waited for that the kernel does not have.
const RETRY: Duration = Duration::from_millis(1);

impl MissingPages {
    /// Whether this kernel can do what [`MissingPages::replace`] needs.
    pub fn can_replace(&self) -> bool {
        self.can_replace
    }

    /// Gives the missing pages of the huge page `run` the contents that they have in `area`, from which they go, and wakes who waits for
    /// them; pages that are there already keep what they hold. No device may be writing to them by way of their physical address (as direct
    /// I/O does), and nobody may be writing to them in `area`.
    pub fn replace(&self, run: PageRun, area: &StagingArea) -> Result<(), UffdError> {
        if !HostPage::HUGE.divides(run) || run.count != HostPage::HUGE.pages() {
            return Err(UffdError::BadRun(run));
        }
        let (Some(place), Some(source)) = (self.ram.host_address(run), area.ram().host_address(run)) else {
            return Err(UffdError::BadRun(run));
        };
        // Who is told meanwhile that a page is not missing (so that zeros are placed if there is nothing) must find the page again, and
        // nobody may place one in the gap.
        let alone = self.placing.alone(run);
        if self.move_whole(run, place, source, area).is_some() {
            return Ok(());
        }
        // One by one: the kernel has refused some step, or only part of it is huge here. What the guest had is in `area` or still in place.
        let copy = |dst, offset, len| {
            // SAFETY: within the run's pages of `area`.
            let from = unsafe { source.add(offset) };
            // SAFETY: the pages of `area` are mapped, and nobody writes to them.
            unsafe { self.copy_from(dst, from, len) }
        };
        let filled = loop {
            match self.fill(run, copy) {
                // There may be memory again in a moment, and nowhere else is what the guest had.
                Err(UffdError::Place { source, .. }) if source.raw_os_error() == Some(libc::ENOMEM) => std::thread::sleep(RETRY),
                filled => break filled,
            }
        };
        if filled.is_err() {
            // Part of what the guest had is nowhere but in `area`. It must not find zeros in its place, but wait.
            std::mem::forget(alone);
        } else {
            // SAFETY: within `area`, which nobody needs any more for this run.
            let _ = unsafe { madvise(source.as_ptr().cast(), run.bytes() as usize, Advice::LinuxDontNeed) };
        }
        filled.map(drop)
    }

    /// The fast way. `None` leaves every page that the guest had either in place or in `area`.
    fn move_whole(&self, run: PageRun, place: NonNull<u8>, source: NonNull<u8>, area: &StagingArea) -> Option<()> {
        let length = run.bytes() as usize;
        // Now, while nothing is placed: what is populated below is all that the guest can have written.
        let populated = area.populated(&self.ram, run).ok()?;
        let mut room = area.aside();
        let aside = room.as_ref()?.base();
        // The guest's own pages give way, together, and whoever touches one of them from here on waits. (kernel document
        // admin-guide/mm/userfaultfd; MREMAP_DONTUNMAP leaves the mapping and its watch as they are.)
        // SAFETY: a part of guest RAM, to which nothing holds references, goes to the room that is set aside, in which nothing is needed.
        let given_way = unsafe {
            mremap_fixed(place.as_ptr().cast(), length, length, MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP, aside.as_ptr().cast())
        };
        if given_way.is_err() {
            // The room may have been unmapped before it failed, and somebody else's memory be there by now.
            std::mem::forget(room.take());
            return None;
        }
        // Nothing is there now. This lets the kernel free the table of small pages (since Linux 6.14), without which a huge page has no
        // place; with it the move below is slower, no more.
        // SAFETY: within guest RAM, to which nothing holds references.
        let _ = unsafe { madvise(place.as_ptr().cast(), length, Advice::LinuxDontNeed) };
        for (page, _) in populated.iter().enumerate().filter(|(_, populated)| **populated) {
            // SAFETY: both are one page of mappings of a huge page's length, and not the same one.
            unsafe { source.add(page * PAGE_SIZE).copy_from_nonoverlapping(aside.add(page * PAGE_SIZE), PAGE_SIZE) };
        }
        drop(room);
        let mut done = 0;
        while done < length {
            let (dst, src) = (place.as_ptr() as u64 + done as u64, source.as_ptr() as u64 + done as u64);
            let mut argument = UffdioMove { dst, src, len: (length - done) as u64, mode: 0, moved: 0 };
            // SAFETY: pages of guest RAM and of `area`, to neither of which anything holds references.
            if unsafe { ioctl_with_mut_ref(&self.uffd, UFFDIO_MOVE, &mut argument) } == 0 {
                return Some(());
            }
            let error = std::io::Error::last_os_error().raw_os_error();
            // As for UFFDIO_COPY.
            done += usize::try_from(argument.moved).unwrap_or(0);
            if !matches!(error, Some(libc::EAGAIN | libc::EINTR)) {
                return None;
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests;
