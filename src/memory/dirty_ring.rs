//! KVM's dirty rings (kernel document virt/kvm/api, KVM_CAP_DIRTY_LOG_RING): each vCPU lists the pages it dirties in a ring that KVM and
//! this process share, so that a harvest costs as much as there is to harvest, however large RAM is.
//!
//! An entry is dirty, then collected here, then reset by KVM, which protects its page again. Resetting is what clearing is to the log, and
//! it comes with every collection. A ring that has run full keeps its vCPU out of the guest until somebody has collected, so collecting is
//! not only the harvest's affair, and what is collected in between is kept for it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};
use vmm_sys_util::ioctl::ioctl;

use super::dirty_log::mask_of_word;
use super::dirty_tracker::{TrackerError, switch};
use super::populated::populated;
use super::{GuestRam, PAGE_SIZE, PageRun, PageSet};

// kvm-ioctls does not wrap this one.
const KVM_RESET_DIRTY_RINGS: libc::c_ulong = rustix::ioctl::opcode::none(KVMIO as u8, 0xc7) as libc::c_ulong;

/// KVM has put a page into the entry (KVM_DIRTY_GFN_F_DIRTY).
const DIRTY: u32 = 1 << 0;
/// The page has been taken out, KVM may reset the entry (KVM_DIRTY_GFN_F_RESET).
const RESET: u32 = 1 << 1;

/// Entries of one vCPU's ring, 64 KiB of kernel memory.
pub const ENTRIES: u32 = 1 << 12;

/// `struct kvm_dirty_gfn`, as two sides that do not wait for each other may touch it.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Entry>() == 16 && size_of::<kvm_dirty_gfn>() == 16);
    assert!(offset_of!(Entry, flags) == offset_of!(kvm_dirty_gfn, flags));
    assert!(offset_of!(Entry, slot) == offset_of!(kvm_dirty_gfn, slot));
    assert!(offset_of!(Entry, offset) == offset_of!(kvm_dirty_gfn, offset));
};

/// One vCPU's ring, mapped.
struct Ring {
    entries: NonNull<Entry>,
    count: u32,
    /// Where KVM puts its next entry, or has put it; counts on for ever.
    next: u32,
}

// SAFETY: the mapping is the ring's own until it is dropped, and all of it is atomics.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, count: u32) -> io::Result<Self> {
        let (bytes, offset) = (count as usize * size_of::<Entry>(), u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as u64);
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
        let file = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let address =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, offset)? };
        let entries = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Ring { entries, count, next: 0 })
    }

    fn entries(&self) -> &[Entry] {
        // SAFETY: the mapping has `count` entries, is page-aligned, lives as long as `self`, and any bytes in it are valid atomics.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), self.count as usize) }
    }

    /// Gives the slot and offset of each dirty entry to `take` and marks it as taken; returns how many there were. At most the ring once
    /// round, because a guest that runs adds to it all the time.
    fn take(&mut self, mut take: impl FnMut(u32, u64)) -> u64 {
        let mut taken = 0;
        let mut next = self.next;
        // KVM's counts are powers of two, so the index goes round with the counter.
        while let Some(entry) = self.entries().get((next % self.count) as usize).filter(|_| taken < u64::from(self.count)) {
            // Acquire: slot and offset are what KVM wrote before it set the flag.
            if entry.flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                break;
            }
            take(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
            // Release: KVM may use the entry anew only after it was read.
            entry.flags.store(RESET, Ordering::Release);
            next = next.wrapping_add(1);
            taken += 1;
        }
        self.next = next;
        taken
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.entries.as_ptr().cast(), self.count as usize * size_of::<Entry>()) };
    }
}

/// The dirty rings of all vCPUs of a machine.
pub struct DirtyRings {
    // One lock over taking and resetting, so that a page is in `dirty` only once writes to it show again. Threads that hold it wait for
    // nothing but KVM. Dropped first: the rings hold their VM.
    state: Mutex<State>,
    vm: Arc<VmFd>,
    ram: GuestRam,
    entries: u32,
}

#[derive(Default)]
struct State {
    /// In the order of the vCPUs.
    rings: Vec<Ring>,
    /// Words of a set of pages: what was collected and not harvested. Only those with a page in them, so that it is as small as that.
    dirty: BTreeMap<u64, u64>,
    /// Entries marked as taken that KVM has not reset.
    unreset: u64,
    /// KVM was interrupted while it reset, see [`DirtyRings::reset`].
    interrupted: bool,
    /// An entry for a page that does not exist: the next harvest fails for it.
    strange: Option<TrackerError>,
    /// KVM has written over entries. From then on its place in the ring is not known, so this machine is never tracked again.
    overrun: bool,
}

impl State {
    fn check_overrun(&self) -> Result<(), TrackerError> {
        if self.overrun { Err(TrackerError::Overrun) } else { Ok(()) }
    }
}

impl DirtyRings {
    /// Gives every vCPU that `vm` will have a ring of `entries`, a power of two; `ram` is what the memory slots show. There must be no
    /// vCPU yet. KVM has no dirty log for this machine from here on.
    pub fn enable(vm: Arc<VmFd>, ram: GuestRam, entries: u32) -> Result<Self, TrackerError> {
        // On x86-64 the two are alike, and older kernels know the second only.
        let known = |cap: &u32| vm.check_extension_raw((*cap).into()) > 0;
        let cap = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING].into_iter().find(known).ok_or(TrackerError::NoRing)?;
        let bytes = u64::from(entries) * size_of::<Entry>() as u64;
        vm.enable_cap(&kvm_enable_cap { cap, args: [bytes, 0, 0, 0], ..Default::default() })
            .map_err(|source| TrackerError::Enable { entries, source })?;
        Ok(DirtyRings { state: Mutex::default(), vm, ram, entries })
    }

    /// KVM's descriptor of the machine.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Takes in the ring of a new vCPU, before it runs.
    pub fn add(&self, vcpu: &VcpuFd) -> Result<(), TrackerError> {
        let ring = Ring::map(vcpu, self.entries).map_err(TrackerError::Map)?;
        self.state().rings.push(ring);
        Ok(())
    }

    /// Empties the rings and keeps for the next harvest what was in them. For the thread of a vCPU that finds its ring full: also while a
    /// harvest is under way on another thread, and after the last one, when there is only a rest to throw away.
    pub fn collect(&self) -> Result<(), TrackerError> {
        let mut state = self.state();
        let taken = self.collect_into(&mut state)?;
        // Full, and nothing in it: it would stay so for ever.
        if taken == 0 { state.check_overrun() } else { Ok(()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many entries there were.
    fn collect_into(&self, state: &mut State) -> Result<u64, TrackerError> {
        let State { rings, dirty, unreset, strange, overrun, .. } = state;
        let mut taken = 0;
        for ring in rings {
            let entries = ring.take(|slot, offset| match self.page(slot, offset) {
                Some(page) => *dirty.entry(page / 64).or_default() |= 1 << (page % 64),
                None => *strange = Some(TrackerError::Entry { slot, offset }),
            });
            // KVM sees to it that the last entries stay free (KVM_DIRTY_RING_RSVD_ENTRIES); where it fails to, it goes on at the first.
            *overrun |= entries == u64::from(ring.count);
            taken += entries;
        }
        *unreset += taken;
        self.reset(state)?;
        Ok(taken)
    }

    /// The page of an entry; KVM's word is believed as far as the page exists.
    fn page(&self, slot: u32, offset: u64) -> Option<u64> {
        let run = self.ram.slots().iter().find(|known| known.slot == slot)?.run;
        (offset < run.count).then_some(run.first.0 + offset)
    }

    /// Makes KVM reset the entries that were taken.
    ///
    /// A signal interrupts that (Linux 6.16 and later), and then the pages of the last few entries are not protected although their
    /// entries are gone: writes to them would never show. So signals wait, among them the kick of a vCPU's thread. Against those that
    /// cannot wait (a stop, a freezer) the next harvest starts over, see [`RingTracker::harvest`].
    fn reset(&self, state: &mut State) -> Result<(), TrackerError> {
        if state.unreset == 0 {
            return Ok(());
        }
        let signals = SignalsBlocked::new();
        // SAFETY: takes no argument and touches no memory of this process but the rings' flags, which are atomics.
        let reset = unsafe { ioctl(&*self.vm, KVM_RESET_DIRTY_RINGS) };
        let error = io::Error::last_os_error();
        drop(signals);
        let reset = u64::try_from(reset).map_err(|_| TrackerError::Reset(error))?;
        // What is left over is reset by the next call: by the same vCPU, if its ring is still full.
        state.unreset = state.unreset.saturating_sub(reset);
        state.interrupted |= state.unreset > 0;
        Ok(())
    }
}

/// Keeps signals from the calling thread while it lives.
struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    fn new() -> Self {
        // SAFETY: both sets are plain memory that the calls fill in, and they live through them.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
            SignalsBlocked(before)
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the set was filled in by the same call.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

/// Tracking by the rings, begun. [`super::dirty_tracker::DirtyTracker`] says what its calls mean.
pub struct RingTracker {
    rings: Arc<DirtyRings>,
}

impl RingTracker {
    /// See [`super::dirty_tracker::Tracking::start`]. KVM protects all of RAM, which takes some time.
    pub fn start(rings: Arc<DirtyRings>, into: &mut PageSet) -> Result<Self, TrackerError> {
        let tracker = RingTracker { rings };
        tracker.forget()?;
        let DirtyRings { vm, ram, .. } = &*tracker.rings;
        ram.take_device_writes(&mut PageSet::empty(ram.pages()));
        if let Err(error) = switch(vm, ram, true) {
            // Best effort: the guest is better off without a log that nobody reads.
            let _ = switch(vm, ram, false);
            return Err(error);
        }
        // After it: a page that is touched from here on is in a ring.
        populated(ram, into);
        Ok(tracker)
    }

    /// Throws away what the last tracking has left.
    fn forget(&self) -> Result<(), TrackerError> {
        let mut state = self.rings.state();
        self.rings.collect_into(&mut state)?;
        state.dirty.clear();
        (state.interrupted, state.strange) = (false, None);
        state.check_overrun()
    }

    /// See [`super::dirty_tracker::DirtyTracker::harvest`]. What it finds is cleared already.
    pub fn harvest(&mut self, into: &mut PageSet) -> Result<u64, TrackerError> {
        let before = into.len();
        let DirtyRings { vm, ram, .. } = &*self.rings;
        let mut state = self.rings.state();
        self.rings.collect_into(&mut state)?;
        for (index, bits) in std::mem::take(&mut state.dirty) {
            into.insert_word(index as usize, bits);
        }
        if std::mem::take(&mut state.interrupted) {
            // Nobody knows which pages are not protected: protect all of them anew. What was written before is populated.
            switch(vm, ram, false)?;
            switch(vm, ram, true)?;
            populated(ram, into);
        }
        if let Some(error) = state.strange.take() {
            return Err(error);
        }
        state.check_overrun()?;
        drop(state);
        ram.take_device_writes(into);
        Ok(into.len() - before)
    }

    /// See [`super::dirty_tracker::DirtyTracker::clear`]. Harvested pages are clear; this spares the pages that were written since then
    /// from being sent twice.
    pub fn clear(&mut self, pages: &PageSet, range: PageRun) -> Result<(), TrackerError> {
        let mut state = self.rings.state();
        self.rings.collect_into(&mut state)?;
        for (&index, bits) in state.dirty.range_mut(range.first.0 / 64..range.end().div_ceil(64)) {
            *bits &= !(pages.words().get(index as usize).copied().unwrap_or(0) & mask_of_word(range, index));
        }
        Ok(())
    }

    /// See [`super::dirty_tracker::DirtyTracker::stop`].
    pub fn stop(self) -> Result<(), TrackerError> {
        switch(&self.rings.vm, &self.rings.ram, false)?;
        self.forget()
    }
}

#[cfg(test)]
mod tests;
