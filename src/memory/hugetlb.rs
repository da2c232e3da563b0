//! hugetlb pages of 2 MiB: memory that the administrator has set aside as huge pages (kernel document admin-guide/mm/hugetlbpage). They are
//! never swapped or split: a touch populates a whole one, and only whole ones are discarded and placed.

use std::fmt;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use thiserror::Error;

use super::{HUGE_PAGE, PAGE_SIZE};

/// Where the kernel keeps the counts of these pages, whatever its default size of huge pages is.
pub const COUNTS: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Why the kernel gave no hugetlb memory.
#[derive(Debug, Error)]
pub struct Shortage {
    /// How many pages were asked for.
    needed: u64,
    /// How the kernel stands, if it has such pages.
    pool: Option<Pool>,
    /// What the kernel said.
    source: rustix::io::Errno,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shortage { needed, pool, source } = self;
        write!(f, "cannot allocate {needed} huge pages of 2 MiB for guest memory: {source}; ")?;
        match pool {
            Some(Pool { total, free }) if free < needed => {
                let enough = total + needed - free;
                write!(f, "this host has {free} free; `echo {enough} > {COUNTS}/nr_hugepages` as root sets enough aside")
            }
            Some(Pool { free, .. }) => write!(f, "this host has {free} free, but not for this process; look at its NUMA policy"),
            None => write!(f, "this host's kernel has none; do without hugepages=2M"),
        }
    }
}

/// The kernel's huge pages of 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// How many are set aside, used or not.
    pub total: u64,
    /// How many of them nobody uses or has reserved.
    pub free: u64,
}

impl Pool {
    /// Reads the counts, if the kernel has such pages.
    pub fn read() -> Option<Self> {
        let count = |name: &str| std::fs::read_to_string(format!("{COUNTS}/{name}")).ok()?.trim().parse::<u64>().ok();
        let free = count("free_hugepages")?.saturating_sub(count("resv_hugepages")?);
        // Surplus ones, which the kernel made on demand, go when they are freed.
        let total = count("nr_hugepages")?.saturating_sub(count("surplus_hugepages")?);
        Some(Pool { total, free })
    }
}

/// Maps `size` bytes, whole huge pages, and reserves them: what is not there is missed now and not at a touch, which would be SIGBUS.
pub(super) fn map_hugetlb(size: usize) -> Result<NonNull<u8>, Shortage> {
    let needed = (size / PAGE_SIZE) as u64 / HUGE_PAGE;
    let error = |source| Shortage { needed, pool: Pool::read(), source };
    let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, flags) }.map_err(error)?;
    NonNull::new(start.cast()).ok_or_else(|| error(rustix::io::Errno::NOMEM))
}

#[cfg(test)]
pub(crate) mod provision;
#[cfg(test)]
mod tests;
