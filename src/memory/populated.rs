//! Which pages of guest RAM were ever written, as far as the host's page tables tell. A page that is not populated reads as zero, so
//! migration neither reads nor sends it: on a guest that uses a tenth of its RAM that saves nine tenths of the work.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::{GuestRam, PAGE_SIZE, PageNumber, PageRun, PageSet};

/// `struct page_region` of linux/fs.h: neighbouring pages that are alike. Addresses in bytes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h (PAGEMAP_SCAN(2const)).
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<PageRegion>() == 24);
const _: () = assert!(size_of::<PmScanArg>() == 96);

const PAGEMAP_SCAN: libc::c_ulong = rustix::ioctl::opcode::read_write::<PmScanArg>(b'f', 16) as libc::c_ulong;

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Bits of an entry of /proc/self/pagemap (kernel document admin-guide/mm/pagemap).
const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_SWAPPED: u64 = 1 << 62;

/// Adds to `into` every page of `ram` that may hold anything but zeros; returns how many were new.
///
/// Only pages that were never written, or that only the kernel's shared zero page stands for, are left out. Where the kernel cannot
/// say, that is none of them. A page that the guest writes for the first time during the scan may be missed: scan after dirty logging
/// has begun.
pub fn populated(ram: &GuestRam, into: &mut PageSet) -> u64 {
    let before = into.len();
    let found =
        File::open("/proc/self/pagemap").and_then(|pagemap| scan(&pagemap, ram, into).or_else(|_| read_entries(&pagemap, ram, into)));
    if found.is_err() {
        into.insert(PageRun::new(0, ram.pages()));
    }
    into.len() - before
}

/// Linux 6.7 and later: the kernel walks the page tables and reports runs.
fn scan(pagemap: &File, ram: &GuestRam, into: &mut PageSet) -> io::Result<()> {
    let base = ram.base().as_ptr() as u64;
    let mut regions = [PageRegion::default(); 512];
    let mut argument = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        start: base,
        end: base + ram.size(),
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_inverted: PAGE_IS_PFNZERO,
        category_mask: PAGE_IS_PFNZERO,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_PRESENT,
        ..PmScanArg::default()
    };
    while argument.start < argument.end {
        // SAFETY: the argument's size is asserted above; `vec` points to `vec_len` regions that live and are not otherwise borrowed
        // during the call.
        let found = unsafe { ioctl_with_mut_ref(pagemap, PAGEMAP_SCAN, &mut argument) };
        let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
        for region in regions.iter().take(found) {
            let first = (region.start - base) / PAGE_SIZE as u64;
            into.insert(PageRun::new(first, (region.end - region.start) / PAGE_SIZE as u64));
        }
        if argument.walk_end <= argument.start {
            return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
        }
        argument.start = argument.walk_end;
    }
    Ok(())
}

/// Older kernels: one entry per page. Zero pages are not told apart here.
fn read_entries(pagemap: &File, ram: &GuestRam, into: &mut PageSet) -> io::Result<()> {
    const ENTRIES: u64 = 64 << 10;
    let first_entry = ram.base().as_ptr() as u64 / PAGE_SIZE as u64;
    let mut buffer = vec![0; ENTRIES as usize * 8];
    for chunk in (0..ram.pages()).step_by(ENTRIES as usize) {
        let bytes = &mut buffer[..(ram.pages() - chunk).min(ENTRIES) as usize * 8];
        pagemap.read_exact_at(bytes, (first_entry + chunk) * 8)?;
        for (page, entry) in (chunk..).zip(bytes.as_chunks().0) {
            if u64::from_ne_bytes(*entry) & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED) != 0 {
                into.insert(PageRun::single(PageNumber(page)));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
