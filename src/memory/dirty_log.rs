//! Which pages the guest and its devices have changed: KVM's dirty log, united with what vm-memory's bitmaps collected.
//!
//! KVM's log is used with manual protect (kernel document virt/kvm/api, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): fetching it changes
//! nothing, and pages are write-protected again only when their bits are cleared, a few at a time, just before they are read. All bits
//! begin set, so that switching the log on protects nothing either. Where the kernel lacks this, fetching clears, behind the same
//! interface.
//!
//! The bits of memory that nobody has touched yet would have to be cleared, too, so that the log can tell when somebody does: milliseconds a
//! GiB where KVM looks at every page. Large stretches of it are left alone instead, and the host's page tables are asked whether anything
//! has appeared there, which takes microseconds for as long as nothing has.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use super::dirty_tracker::{TrackerError, switch};
use super::pagemap::Pagemap;
use super::populated::{populated, scan};
use super::ram::RamSlot;
use super::{GuestRam, PageRun, PageSet};

// kvm-ioctls does not wrap the one and returns a new vector from the other. The structures' sizes are part of the numbers.
const KVM_GET_DIRTY_LOG: libc::c_ulong = rustix::ioctl::opcode::write::<kvm_dirty_log>(KVMIO as u8, 0x42) as libc::c_ulong;
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = rustix::ioctl::opcode::read_write::<kvm_clear_dirty_log>(KVMIO as u8, 0xc0) as libc::c_ulong;
const _: () = assert!(size_of::<kvm_clear_dirty_log>() == 24 && size_of::<kvm_dirty_log>() == 16);

/// A word of the log: KVM_CLEAR_DIRTY_LOG takes whole ones.
const WORD: u64 = 64;

/// Untouched memory is left to the host's page tables in aligned blocks of so many pages: enough for the number of stretches to stay small.
const BLOCK: u64 = 4096;

/// The dirty log of a guest, switched on. [`super::dirty_tracker::DirtyTracker`] says what its calls mean.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    ram: GuestRam,
    /// With manual protect: the pages whose bits in the log are known to be set, and were handed out. Without: always empty.
    reported: PageSet,
    /// Blocks that nobody has touched, as far as the host's page tables have told: their bits in the log are all set.
    untouched: PageSet,
    /// Of this process, unless the kernel cannot scan them: then no block is left to them.
    page_tables: Option<Pagemap>,
    manual_protect: bool,
    /// What KVM wrote of a slot last, with room for the largest: fresh memory would cost page faults in the blackout.
    fetched: Vec<u64>,
}

impl DirtyLog {
    /// Switches the log on for every slot of `ram` in `vm`. See [`super::dirty_tracker::Tracking::start`].
    pub fn start(vm: Arc<VmFd>, ram: GuestRam, into: &mut PageSet) -> Result<Self, TrackerError> {
        // KVM looks at the capability when the log of a slot is switched on, so here is early enough, and a guest that never migrates
        // goes without.
        let flags = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        let capability = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args: [flags, 0, 0, 0], ..Default::default() };
        let manual_protect = vm.enable_cap(&capability).is_ok();
        let none = PageSet::empty(ram.pages());
        let page_tables = Pagemap::open().ok();
        // Anything but zero, for which the allocator would give memory that is not there yet.
        let fetched = vec![!0; ram.slots().iter().map(words_of).max().unwrap_or(0)];
        let mut log = DirtyLog { vm, reported: none.clone(), untouched: none, page_tables, manual_protect, fetched, ram };
        log.ram.take_device_writes(&mut PageSet::empty(log.ram.pages()));
        if let Err(error) = switch(&log.vm, &log.ram, true).and_then(|()| log.collect_populated(into)) {
            // Best effort: the guest is better off without a log that nobody reads.
            let _ = switch(&log.vm, &log.ram, false);
            return Err(error);
        }
        Ok(log)
    }

    fn collect_populated(&mut self, into: &mut PageSet) -> Result<(), TrackerError> {
        let all = PageRun::new(0, self.ram.pages());
        let mut touched = PageSet::empty(self.ram.pages());
        populated(&self.ram, &mut touched);
        if self.manual_protect {
            self.reported.insert(all);
            let mut rest = self.reported.clone();
            rest.subtract(&touched);
            self.untouched = self.whole_blocks(&rest);
            // Cleared (nothing is mapped, so that is cheap), the bits of the rest tell of first touches from now on; touches between the scan
            // and the clear are found by scanning once more, after it.
            self.clear(&rest, all)?;
            populated(&self.ram, &mut touched);
            // Left to the next harvest.
            touched.subtract(&self.untouched);
        }
        into.union(&touched);
        Ok(())
    }

    /// See [`super::dirty_tracker::DirtyTracker::harvest`]. A page is reported once until it is cleared.
    pub fn harvest(&mut self, into: &mut PageSet) -> Result<u64, TrackerError> {
        let before = into.len();
        for slot in self.ram.slots() {
            let fetched = fetch(&self.vm, slot, &mut self.fetched)?;
            // Slots begin at a multiple of 64 pages, so words line up.
            let base = (slot.run.first.0 / WORD) as usize;
            for (index, &bits) in (base..).zip(fetched) {
                let known = self.reported.words().get(index).copied().unwrap_or(0);
                if bits & !known == 0 {
                    continue;
                }
                into.insert_word(index, bits & !known);
                if self.manual_protect {
                    self.reported.insert_word(index, bits);
                }
            }
        }
        self.harvest_untouched(into)?;
        // Their bitmap forgets what it hands out, so these are always reported.
        self.ram.take_device_writes(into);
        Ok(into.len() - before)
    }

    /// The blocks that lie in `pages` whole, if page tables can be scanned.
    fn whole_blocks(&self, pages: &PageSet) -> PageSet {
        let mut blocks = PageSet::empty(pages.universe());
        let can_scan = |pagemap: &Pagemap| scan(pagemap, &self.ram, PageRun::new(0, 1), &mut PageSet::empty(1)).is_ok();
        if self.page_tables.as_ref().is_some_and(can_scan) {
            for run in pages.runs() {
                let (first, end) = (run.first.0.next_multiple_of(BLOCK), run.end() / BLOCK * BLOCK);
                blocks.insert(PageRun::new(first, end.saturating_sub(first)));
            }
        }
        blocks
    }

    /// Adds to `into` what has appeared in untouched blocks. What is left of such a block is tracked by the log from then on.
    fn harvest_untouched(&mut self, into: &mut PageSet) -> Result<(), TrackerError> {
        if self.untouched.is_empty() {
            return Ok(());
        }
        let mut touched = PageSet::empty(self.ram.pages());
        for run in self.untouched.runs() {
            self.scan(run, &mut touched)?;
        }
        if touched.is_empty() {
            return Ok(());
        }
        let (mut next, mut rest) = (0, PageSet::empty(self.ram.pages()));
        while let Some(page) = touched.next_run(next, 1) {
            let block = PageRun::new(page.first.0 / BLOCK * BLOCK, BLOCK);
            next = block.end();
            self.untouched.remove(block);
            rest.insert(block);
            for run in touched.runs_within(block) {
                rest.remove(run);
            }
            self.clear(&rest, block)?;
            // What was touched before its bit was cleared.
            self.scan(block, &mut touched)?;
        }
        into.union(&touched);
        Ok(())
    }

    fn scan(&self, run: PageRun, into: &mut PageSet) -> Result<(), TrackerError> {
        let scanned = self.page_tables.as_ref().map_or(Ok(()), |pagemap| scan(pagemap, &self.ram, run, into));
        scanned.map_err(|source| TrackerError::Scan { run, source })
    }

    /// See [`super::dirty_tracker::DirtyTracker::clear`].
    pub fn clear(&mut self, pages: &PageSet, range: PageRun) -> Result<(), TrackerError> {
        if !self.manual_protect {
            return Ok(());
        }
        let slots = self.ram.slots().to_vec();
        for slot in slots {
            let first = range.first.0.max(slot.run.first.0);
            let end = range.end().min(slot.run.end());
            if first < end {
                self.clear_in_slot(slot, pages, PageRun::new(first, end - first))?;
            }
        }
        Ok(())
    }

    /// See [`super::dirty_tracker::DirtyTracker::stop`].
    pub fn stop(self) -> Result<(), TrackerError> {
        switch(&self.vm, &self.ram, false)
    }

    /// Clears the bits of `pages` within `run`, which lies in `slot`, as far as they are known to be set: a bit set since the last
    /// harvest stands for a write that nobody has been told of. Those of untouched blocks stay set: a page may have appeared there of which
    /// nobody has been told.
    fn clear_in_slot(&mut self, slot: RamSlot, pages: &PageSet, run: PageRun) -> Result<(), TrackerError> {
        let first_word = run.first.0 / WORD;
        let bits: Vec<u64> = (first_word..run.end().div_ceil(WORD))
            .map(|index| {
                let word = |set: &PageSet| set.words().get(index as usize).copied().unwrap_or(0);
                word(pages) & word(&self.reported) & !word(&self.untouched) & mask_of_word(run, index)
            })
            .collect();
        if bits.iter().all(|word| *word == 0) {
            return Ok(());
        }
        let argument = kvm_clear_dirty_log {
            slot: slot.slot,
            // Fits: KVM's slots are at most 2^31 - 1 pages.
            num_pages: (bits.len() as u64 * WORD) as u32,
            first_page: first_word * WORD - slot.run.first.0,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_ptr().cast_mut().cast() },
        };
        // SAFETY: KVM reads `num_pages` bits from `dirty_bitmap`, which `bits` holds, and does not write to them.
        if unsafe { ioctl_with_ref(&*self.vm, KVM_CLEAR_DIRTY_LOG, &argument) } < 0 {
            return Err(TrackerError::Clear { slot: slot.slot, run, source: io::Error::last_os_error() });
        }
        for (index, bits) in (first_word..).zip(bits) {
            self.reported.remove_word(index as usize, bits);
        }
        Ok(())
    }
}

/// How many words the log of `slot` has.
fn words_of(slot: &RamSlot) -> usize {
    slot.run.count.div_ceil(WORD) as usize
}

/// Has KVM write the log of `slot` to the beginning of `buffer`, which has room for it; returns it.
fn fetch<'a>(vm: &VmFd, slot: &RamSlot, buffer: &'a mut [u64]) -> Result<&'a [u64], TrackerError> {
    let refused = |errno| TrackerError::Get { slot: slot.slot, source: kvm_ioctls::Error::new(errno) };
    let words = buffer.get_mut(..words_of(slot)).ok_or_else(|| refused(libc::ENOBUFS))?;
    let dirty_bitmap = words.as_mut_ptr().cast();
    let mut log = kvm_dirty_log { slot: slot.slot, padding1: 0, __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap } };
    // SAFETY: KVM writes a bit for each page of the slot, rounded up to whole words, and `words` is as long as that.
    if unsafe { ioctl_with_mut_ref(vm, KVM_GET_DIRTY_LOG, &mut log) } < 0 {
        return Err(refused(io::Error::last_os_error().raw_os_error().unwrap_or(0)));
    }
    Ok(words)
}

/// The bits of word `index` of a set that stand for pages of `run`.
pub(super) fn mask_of_word(run: PageRun, index: u64) -> u64 {
    let start = run.first.0.saturating_sub(index * WORD).min(WORD);
    let end = run.end().saturating_sub(index * WORD).min(WORD);
    let below = |bit: u64| if bit == WORD { !0 } else { (1u64 << bit) - 1 };
    below(end) & !below(start)
}

#[cfg(test)]
mod tests;
