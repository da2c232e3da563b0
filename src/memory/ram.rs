//! Guest RAM: one anonymous mapping, shown to the guest below and above the 32-bit hole. It is made of the host's ordinary pages, of
//! which the kernel makes transparent huge ones where it can, or of hugetlb pages, which were set aside for such use.

use std::ptr::NonNull;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use super::device_writes::DeviceWrites;
use super::hugetlb::{Shortage, map_hugetlb};
use super::{HostPage, PAGE_SIZE, PageNumber, PageRun, PageSet};

/// Guest memory as virtio-queue and the loaders take it; its bitmap collects what devices write.
pub type GuestMemory = GuestMemoryMmap<DeviceWrites>;

/// First guest address of the hole that MMIO lives in; RAM that does not fit below it continues at [`HOLE_END`].
pub const HOLE_START: u64 = 3 << 30;
/// First guest address after the hole.
pub const HOLE_END: u64 = 4 << 30;
/// RAM comes in multiples of this many bytes, the size of an x86-64 huge page.
pub const GRANULE: u64 = 2 << 20;

/// Why guest RAM could not be set up.
#[derive(Debug, Error)]
pub enum RamError {
    /// The size is zero or not a multiple of [`GRANULE`].
    #[error("guest memory of {0} bytes is not a multiple of 2M; round it up")]
    Size(u64),
    /// The kernel gave no mapping.
    #[error("cannot allocate {size} bytes of guest memory: {source}; give the guest less --memory")]
    Map {
        /// What was asked for, in bytes.
        size: u64,
        /// What the kernel said.
        source: rustix::io::Errno,
    },
    /// The kernel has too few hugetlb pages.
    #[error(transparent)]
    Hugetlb(#[from] Shortage),
    /// RAM cannot be held in memory.
    #[error(
        "cannot lock {size} bytes of guest memory: {source}; raise the limit of locked memory (ulimit -l), run as root, or use lock=off"
    )]
    Lock {
        /// Size of RAM in bytes.
        size: u64,
        /// What the kernel said.
        source: rustix::io::Errno,
    },
    /// vm-memory refused the regions.
    #[error("cannot lay out guest memory: {0}")]
    Layout(String),
}

/// One contiguous piece of RAM in guest-physical space: a KVM memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamSlot {
    /// KVM slot number.
    pub slot: u32,
    /// Where the guest sees it.
    pub start: GuestAddress,
    /// Which pages of RAM it holds.
    pub run: PageRun,
}

/// All of a guest's RAM. Clones share the same memory.
#[derive(Clone)]
pub struct GuestRam {
    inner: Arc<Inner>,
}

struct Inner {
    // Dropped before `mapping`: its regions point into it.
    memory: GuestMemory,
    slots: Vec<RamSlot>,
    mapping: Mapping,
}

/// An anonymous private mapping, aligned to [`GRANULE`] so that huge pages fit, unmapped on drop.
struct Mapping {
    base: NonNull<u8>,
    size: usize,
    host_page: HostPage,
}

// SAFETY: the mapping is plain memory shared with a running guest; every access to it goes through raw pointers or vm-memory's volatile
// slices, never through references that assume exclusive ownership.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(size: u64) -> Result<Self, RamError> {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
        let error = |source| RamError::Map { size, source };
        let length = usize::try_from(size).map_err(|_| RamError::Size(size))?;
        let padded = length.checked_add(GRANULE as usize).ok_or(RamError::Size(size))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory; the pieces cut off below belong to it
        // and nothing has a pointer into them.
        unsafe {
            // Without MAP_NORESERVE, so that the kernel refuses what the host can never hold, as its overcommit policy says.
            let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
            let raw = mmap_anonymous(std::ptr::null_mut(), padded, prot, flags).map_err(error)?;
            let head = raw.align_offset(GRANULE as usize);
            let base = raw.byte_add(head);
            if head > 0 {
                munmap(raw, head).map_err(error)?;
            }
            munmap(base.byte_add(length), padded - head - length).map_err(error)?;
            // Only a hint: kernels without transparent huge pages refuse it.
            let _ = madvise(base, length, Advice::LinuxHugepage);
            let base = NonNull::new(base.cast()).ok_or(RamError::Size(size))?;
            Ok(Mapping { base, size: length, host_page: HostPage::SMALL })
        }
    }

    fn hugetlb(size: u64) -> Result<Self, RamError> {
        let length = usize::try_from(size).map_err(|_| RamError::Size(size))?;
        Ok(Mapping { base: map_hugetlb(length)?, size: length, host_page: HostPage::HUGE })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and the last clone of `GuestRam` is gone, so nothing points into it any more.
        unsafe {
            let _ = rustix::mm::munmap(self.base.as_ptr().cast(), self.size);
        }
    }
}

impl std::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestRam").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl GuestRam {
    /// Maps `size` bytes of zeroed RAM, at guest address 0 up to [`HOLE_START`] and from [`HOLE_END`] on. Nothing is populated.
    pub fn allocate(size: u64) -> Result<Self, RamError> {
        Self::lay_out(size, Mapping::new)
    }

    /// The same of hugetlb pages, all of which are reserved at once, so that a touch never fails for want of one.
    pub fn allocate_hugetlb(size: u64) -> Result<Self, RamError> {
        Self::lay_out(size, Mapping::hugetlb)
    }

    fn lay_out(size: u64, map: impl FnOnce(u64) -> Result<Mapping, RamError>) -> Result<Self, RamError> {
        if size == 0 || !size.is_multiple_of(GRANULE) {
            return Err(RamError::Size(size));
        }
        let mapping = map(size)?;
        // SAFETY: only advice, for a mapping of our own. A core dump of the monitor must not carry the guest's memory.
        let _ = unsafe { rustix::mm::madvise(mapping.base.as_ptr().cast(), mapping.size, rustix::mm::Advice::LinuxDontDump) };
        let low = size.min(HOLE_START);
        let mut slots = vec![RamSlot { slot: 0, start: GuestAddress(0), run: PageRun::new(0, low / PAGE_SIZE as u64) }];
        if size > low {
            let run = PageRun::new(low / PAGE_SIZE as u64, (size - low) / PAGE_SIZE as u64);
            slots.push(RamSlot { slot: 1, start: GuestAddress(HOLE_END), run });
        }
        let layout = |error: &dyn std::fmt::Display| RamError::Layout(error.to_string());
        let regions = slots.iter().map(|slot| {
            let bytes = slot.run.bytes() as usize;
            let builder = MmapRegionBuilder::new_with_bitmap(bytes, DeviceWrites::new(bytes))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE);
            // SAFETY: the slot's pages lie within `mapping`, which `Inner` keeps for as long as the region.
            let region = unsafe { builder.with_raw_mmap_pointer(mapping.base.as_ptr().add(slot.run.first.offset() as usize)) };
            let region = region.build().map_err(|error| layout(&error))?;
            GuestRegionMmap::new(region, slot.start).ok_or_else(|| layout(&"a region ends beyond the address space"))
        });
        let memory = GuestMemory::from_regions(regions.collect::<Result<_, _>>()?).map_err(|error| layout(&error))?;
        Ok(GuestRam { inner: Arc::new(Inner { memory, slots, mapping }) })
    }

    /// RAM as vm-memory sees it. Do not keep a clone of it beyond this `GuestRam`.
    pub fn memory(&self) -> &GuestMemory {
        &self.inner.memory
    }

    /// The KVM memory slots, in the order of their pages.
    pub fn slots(&self) -> &[RamSlot] {
        &self.inner.slots
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.inner.mapping.size as u64
    }

    /// Size in pages.
    pub fn pages(&self) -> u64 {
        self.size() / PAGE_SIZE as u64
    }

    /// Size of the host's pages that RAM is made of.
    pub fn host_page(&self) -> HostPage {
        self.inner.mapping.host_page
    }

    /// Host address of the first byte of RAM; the pages follow one another from here, holes left out.
    pub fn base(&self) -> NonNull<u8> {
        self.inner.mapping.base
    }

    /// Host address of the pages of `run`, or nothing where it reaches beyond RAM.
    pub fn host_address(&self, run: PageRun) -> Option<NonNull<u8>> {
        // SAFETY: the run was just checked to lie within the mapping.
        run.is_within(self.pages()).then(|| unsafe { self.base().add(run.first.offset() as usize) })
    }

    /// The page behind the host address `address`, as userfaultfd reports it.
    pub fn page_at_host_address(&self, address: usize) -> Option<PageNumber> {
        let offset = address.checked_sub(self.base().as_ptr() as usize)? as u64;
        (offset < self.size()).then(|| PageNumber::containing(offset))
    }

    /// Where the guest sees `page`.
    pub fn guest_address(&self, page: PageNumber) -> Option<GuestAddress> {
        let slot = self.inner.slots.iter().find(|slot| slot.run.first <= page && page.0 < slot.run.end())?;
        Some(GuestAddress(slot.start.0 + page.offset() - slot.run.first.offset()))
    }

    /// The page that the guest sees at `address`.
    pub fn page_at(&self, address: GuestAddress) -> Option<PageNumber> {
        let slot = self.inner.slots.iter().find(|slot| (slot.start.0..slot.start.0 + slot.run.bytes()).contains(&address.0))?;
        Some(PageNumber::containing(address.0 - slot.start.0 + slot.run.first.offset()))
    }

    /// Makes all of RAM zero again, as a reset guest finds it. Only for RAM that no machine uses and that userfaultfd does not watch: there
    /// the pages would be missing, not zero.
    pub fn clear(&self) -> Result<(), RamError> {
        // SAFETY: the whole of our own private anonymous mapping, whose bytes nobody holds references to.
        unsafe { rustix::mm::madvise(self.base().as_ptr().cast(), self.inner.mapping.size, rustix::mm::Advice::LinuxDontNeed) }
            .map_err(|source| RamError::Map { size: self.size(), source })
    }

    /// Populates all of RAM and holds it in memory. Not while pages are missing: they would be waited for.
    pub fn lock(&self) -> Result<(), RamError> {
        // SAFETY: locking changes no contents, and the range is the mapping.
        unsafe { rustix::mm::mlock(self.base().as_ptr().cast(), self.inner.mapping.size) }
            .map_err(|source| RamError::Lock { size: self.size(), source })
    }

    /// Lets the kernel take pages again; what was locked cannot be discarded.
    pub fn unlock(&self) {
        // SAFETY: as for `lock`. Fails only for what is not mapped.
        let _ = unsafe { rustix::mm::munlock(self.base().as_ptr().cast(), self.inner.mapping.size) };
    }

    /// Whether [`GuestRam::lock`] would be allowed. Populates nothing.
    pub fn may_lock(&self) -> Result<(), RamError> {
        let (start, size) = (self.base().as_ptr().cast(), self.inner.mapping.size);
        // SAFETY: as for `lock`.
        unsafe { rustix::mm::mlock_with(start, size, rustix::mm::MlockFlags::ONFAULT) }
            .map_err(|source| RamError::Lock { size: self.size(), source })?;
        self.unlock();
        Ok(())
    }

    /// Moves the pages that devices have written since the last call from vm-memory's bitmaps into `dirty`. Devices mark a page when
    /// their write is complete, not when it is submitted: a mark harvested early would miss the data.
    pub fn take_device_writes(&self, dirty: &mut PageSet) {
        for (region, slot) in self.memory().iter().zip(self.slots()) {
            // Both parts of RAM begin at a multiple of GRANULE, so words line up.
            let base = (slot.run.first.0 / 64) as usize;
            region.get_mmap().bitmap().take(|index, bits| dirty.insert_word(base + index, bits));
        }
    }
}

const _: () = assert!((GRANULE / PAGE_SIZE as u64).is_multiple_of(64));

#[cfg(test)]
mod tests;
