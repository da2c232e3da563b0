//! What the host's page tables say of guest RAM (kernel document admin-guide/mm/pagemap).

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

/// Categories of pages, as bits.
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
pub const PAGE_IS_HUGE: u64 = 1 << 6;

/// Bits of an entry of the file.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;

/// This process's page tables.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens /proc/self/pagemap.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Pagemap)
    }

    /// Adds to `into` the pages of `run` in `ram` that are of any of `categories`, but for those that the kernel's shared zero pages stand
    /// for. Linux 6.7 and later: the kernel walks the page tables and finds runs; earlier ones say ENOTTY.
    pub fn scan(&self, ram: &GuestRam, run: PageRun, categories: u64, into: &mut PageSet) -> io::Result<()> {
        let base = ram.base().as_ptr() as u64;
        let start = ram.host_address(run).ok_or(io::ErrorKind::InvalidInput)?.as_ptr() as u64;
        let mut regions = [PageRegion::default(); 512];
        let mut argument = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start,
            end: start + run.bytes(),
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: PAGE_IS_PFNZERO,
            category_mask: PAGE_IS_PFNZERO,
            category_anyof_mask: categories,
            return_mask: PAGE_IS_PRESENT,
            ..PmScanArg::default()
        };
        while argument.start < argument.end {
            // SAFETY: the argument's size is asserted above; `vec` points to `vec_len` regions that live and are not otherwise borrowed
            // during the call.
            let found = unsafe { ioctl_with_mut_ref(&self.0, PAGEMAP_SCAN, &mut argument) };
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

    /// Which pages of `run` in `ram` are present or swapped, zero pages included, in their order. None beyond RAM.
    pub fn populated(&self, ram: &GuestRam, run: PageRun) -> io::Result<Vec<bool>> {
        let start = ram.host_address(run).ok_or(io::ErrorKind::InvalidInput)?;
        let mut entries = vec![0; run.count as usize * 8];
        self.0.read_exact_at(&mut entries, start.as_ptr() as u64 / PAGE_SIZE as u64 * 8)?;
        let is_populated = |entry: &[u8; 8]| u64::from_ne_bytes(*entry) & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0;
        Ok(entries.as_chunks().0.iter().map(is_populated).collect())
    }

    /// Adds to `into` the pages of `ram` that are present or swapped, on every kernel. One entry per page; zero pages are not told apart.
    pub fn read_entries(&self, ram: &GuestRam, into: &mut PageSet) -> io::Result<()> {
        const ENTRIES: u64 = 64 << 10;
        let first_entry = ram.base().as_ptr() as u64 / PAGE_SIZE as u64;
        let mut buffer = vec![0; ENTRIES as usize * 8];
        for chunk in (0..ram.pages()).step_by(ENTRIES as usize) {
            let bytes = &mut buffer[..(ram.pages() - chunk).min(ENTRIES) as usize * 8];
            self.0.read_exact_at(bytes, (first_entry + chunk) * 8)?;
            for (page, entry) in (chunk..).zip(bytes.as_chunks().0) {
                if u64::from_ne_bytes(*entry) & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 {
                    into.insert(PageRun::single(PageNumber(page)));
                }
            }
        }
        Ok(())
    }
}
