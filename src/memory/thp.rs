//! Transparent huge pages (kernel document admin-guide/mm/transhuge): the host's page tables and the guest's are shorter with them, and a
//! guest is slower where they are missing. A migration receives pages one by one, which leaves none behind unless it is told where they were.
//!
//! All of it is advice: where the kernel does not take it, or has no memory in such pieces, there are fewer huge pages and nothing else.

use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

use super::pagemap::{PAGE_IS_HUGE, Pagemap};
use super::populated::populated;
use super::{GuestRam, HUGE_PAGE, HostPage, PageRun, PageSet};

/// Most ranges that [`huge_ranges`] finds.
pub const MAX_RANGES: usize = 32 << 10;
/// Most ranges that [`allow_only`] allows huge pages in. Each is a mapping of its own to the kernel until advice is alike everywhere again,
/// which takes some microseconds a range, at the worst while the guest stands still.
const MAX_ALLOWED: usize = 512;

/// The ranges of `ram` that are mapped by transparent huge pages, ascending, in whole huge pages. Where there are more than
/// [`MAX_RANGES`], the longest. None are known before Linux 6.7.
pub fn huge_ranges(ram: &GuestRam) -> Vec<PageRun> {
    longest(huge_pages(ram).runs().collect(), MAX_RANGES)
}

/// The `most` longest of `ranges`, ascending.
fn longest(mut ranges: Vec<PageRun>, most: usize) -> Vec<PageRun> {
    if ranges.len() > most {
        ranges.sort_by_key(|range| std::cmp::Reverse(range.count));
        ranges.truncate(most);
        ranges.sort_by_key(|range| range.first);
    }
    ranges
}

fn huge_pages(ram: &GuestRam) -> PageSet {
    let mut found = PageSet::empty(ram.pages());
    if ram.host_page() == HostPage::SMALL {
        // What was found before an error is true all the same.
        let _ = Pagemap::open().and_then(|pagemap| pagemap.scan(ram, PageRun::new(0, ram.pages()), PAGE_IS_HUGE, &mut found));
    }
    found
}

/// Lets huge pages appear anywhere in `ram`, as they may in that of a guest that never moved.
pub fn allow(ram: &GuestRam) {
    // A kernel without them refuses the advice, and so does hugetlb memory.
    let _ = advise(ram, PageRun::new(0, ram.pages()), Advice::LinuxHugepage);
}

/// Keeps huge pages from appearing in `ram`; those that are there stay. A huge page populates with zeros what was missing around the page
/// that is touched. An error means that they may appear.
pub fn forbid(ram: &GuestRam) -> Result<(), Errno> {
    match advise(ram, PageRun::new(0, ram.pages()), Advice::LinuxNoHugepage) {
        // A kernel without them makes none, and hugetlb memory has none.
        Err(Errno::INVAL) => Ok(()),
        result => result,
    }
}

/// Lets huge pages appear within `ranges` of `ram` only. For a guest that is about to come: where its memory was huge its first page makes
/// a huge page, and elsewhere one page takes no more than a page. Of very many ranges the longest; [`rebuild`] makes up for the others.
pub fn allow_only(ram: &GuestRam, ranges: &[PageRun]) {
    let _ = forbid(ram);
    for range in longest(ranges.to_vec(), MAX_ALLOWED) {
        let _ = advise(ram, range, Advice::LinuxHugepage);
    }
}

/// Makes huge pages again of what lies within `ranges` of `ram`, unless nothing there is populated; returns how many. Huge pages must be
/// allowed, and no page may be missing. It takes milliseconds a page, in which a toucher waits: for a thread in the background, which ends
/// soon after `stop` is set. Needs Linux 6.1.
pub fn rebuild(ram: &GuestRam, ranges: &[PageRun], stop: &AtomicBool) -> u64 {
    let mut todo = PageSet::empty(ram.pages());
    for range in ranges {
        todo.insert(*range);
    }
    todo.subtract(&huge_pages(ram));
    let mut in_use = PageSet::empty(ram.pages());
    populated(ram, &mut in_use);
    let pages =
        todo.runs().flat_map(|run| (run.first.0..run.end()).step_by(HUGE_PAGE as usize)).map(|first| PageRun::new(first, HUGE_PAGE));
    let pages = pages.take_while(|_| !stop.load(Ordering::Relaxed)).filter(|page| in_use.runs_within(*page).next().is_some());
    pages.filter(|page| collapse(ram, *page)).count() as u64
}

/// MADV_COLLAPSE. Fails for pages that somebody else holds just now, for want of memory, and for good where the kernel does not know it.
fn collapse(ram: &GuestRam, page: PageRun) -> bool {
    let Some(start) = ram.host_address(page) else { return false };
    // SAFETY: the contents stay as they are, and the range lies within the mapping.
    unsafe { libc::madvise(start.as_ptr().cast(), page.bytes() as usize, libc::MADV_COLLAPSE) == 0 }
}

fn advise(ram: &GuestRam, run: PageRun, advice: Advice) -> Result<(), Errno> {
    let start = ram.host_address(run).ok_or(Errno::INVAL)?;
    // SAFETY: the advice changes no contents, and the range lies within the mapping.
    unsafe { madvise(start.as_ptr().cast(), run.bytes() as usize, advice) }
}

#[cfg(test)]
mod tests;
