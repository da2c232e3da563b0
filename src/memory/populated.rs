//! Which pages of guest RAM were ever written, as far as the host's page tables tell. A page that is not populated reads as zero, so
//! migration neither reads nor sends it: on a guest that uses a tenth of its RAM that saves nine tenths of the work.

use std::io;

use super::pagemap::{PAGE_IS_PRESENT, PAGE_IS_SWAPPED, Pagemap};
use super::{GuestRam, PageRun, PageSet};

/// Adds to `into` every page of `ram` that may hold anything but zeros; returns how many were new.
///
/// Only pages that were never written, or that only the kernel's shared zero page stands for, are left out. Where the kernel cannot
/// say, that is none of them. A page that the guest writes for the first time during the scan may be missed: scan after dirty logging
/// has begun.
pub fn populated(ram: &GuestRam, into: &mut PageSet) -> u64 {
    let before = into.len();
    let found = Pagemap::open().and_then(|pagemap| {
        let scanned = scan(&pagemap, ram, PageRun::new(0, ram.pages()), into);
        scanned.or_else(|_| pagemap.read_entries(ram, into))
    });
    if found.is_err() {
        into.insert(PageRun::new(0, ram.pages()));
    }
    into.len() - before
}

/// Adds to `into` the pages of `run` in `ram` that may hold anything but zeros. An error where the kernel cannot say.
pub fn scan(pagemap: &Pagemap, ram: &GuestRam, run: PageRun, into: &mut PageSet) -> io::Result<()> {
    pagemap.scan(ram, run, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, into)
}

#[cfg(test)]
mod tests;
