//! What each vCPU keeps about itself, in a page of its own: read by vCPU 0 for the `stat` lines, and by a
//! checker outside the guest.

use core::sync::atomic::AtomicU64;

use crate::latency::Latencies;

/// [`CpuRecord::writing`] while no page is being written.
pub const NOT_WRITING: u64 = u64::MAX;

/// One vCPU's counters: little-endian 64-bit words in this order, at the start of a page.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct CpuRecord {
    /// Number of the first page that this vCPU owns.
    pub first_page: AtomicU64,
    /// How many pages it owns.
    pub pages: AtomicU64,
    /// Pages dirtied; with `filled` the sum of its generations.
    pub writes: AtomicU64,
    /// Pages checked.
    pub reads: AtomicU64,
    /// Times that every page it owns has been checked.
    pub passes: AtomicU64,
    /// The page being written, whose contents and generation may not agree; else [`NOT_WRITING`].
    pub writing: AtomicU64,
    /// Pages written when RAM was filled: all that it owns, or none with `pattern=zero`.
    pub filled: AtomicU64,
    /// Disk blocks written.
    pub disk_writes: AtomicU64,
    /// Disk blocks read back and checked.
    pub disk_reads: AtomicU64,
    /// How far the vCPU has come; see the kernel's `worker`.
    pub phase: AtomicU64,
    /// With `slow=N`: writes of pages that took so long.
    pub slow: Latencies,
}

impl CpuRecord {
    /// Of a vCPU that has not started.
    pub const fn new() -> Self {
        CpuRecord {
            first_page: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            passes: AtomicU64::new(0),
            writing: AtomicU64::new(NOT_WRITING),
            filled: AtomicU64::new(0),
            disk_writes: AtomicU64::new(0),
            disk_reads: AtomicU64::new(0),
            phase: AtomicU64::new(0),
            slow: Latencies::new(),
        }
    }
}

impl Default for CpuRecord {
    fn default() -> Self {
        Self::new()
    }
}

const _: () = assert!(size_of::<CpuRecord>() == crate::page::PAGE_SIZE);
