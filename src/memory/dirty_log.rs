//! Which pages the guest and its devices have changed: KVM's dirty log, united with what vm-memory's bitmaps collected.
//!
//! KVM's log is used with manual protect (kernel document virt/kvm/api, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): fetching it changes
//! nothing, and pages are write-protected again only when their bits are cleared, a few at a time, just before they are read. All bits
//! begin set, so that switching the log on protects nothing either. Where the kernel lacks this, fetching clears, behind the same
//! interface.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVMIO,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use thiserror::Error;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::populated::populated;
use super::ram::RamSlot;
use super::{GuestRam, PageRun, PageSet};

// kvm-ioctls does not wrap this one. The structure's size is part of the number.
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = rustix::ioctl::opcode::read_write::<kvm_clear_dirty_log>(KVMIO as u8, 0xc0) as libc::c_ulong;
const _: () = assert!(size_of::<kvm_clear_dirty_log>() == 24);
const _: () = assert!(size_of::<kvm_userspace_memory_region>() == 32);

/// A word of the log: KVM_CLEAR_DIRTY_LOG takes whole ones.
const WORD: u64 = 64;

/// Why the dirty log could not be used. All of them end the migration; the guest itself is unharmed.
#[derive(Debug, Error)]
pub enum DirtyLogError {
    /// The log could not be switched on or off.
    #[error("cannot switch dirty logging {} for memory slot {slot}: {source}", if *.on { "on" } else { "off" })]
    Switch {
        /// Whether it was to be on.
        on: bool,
        /// KVM's slot number.
        slot: u32,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// The log could not be fetched.
    #[error("cannot fetch the dirty log of memory slot {slot}: {source}")]
    Get {
        /// KVM's slot number.
        slot: u32,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// Bits of the log could not be cleared.
    #[error("cannot clear the dirty log of memory slot {slot} for {run}: {source}")]
    Clear {
        /// KVM's slot number.
        slot: u32,
        /// The pages concerned.
        run: PageRun,
        /// What KVM said.
        source: io::Error,
    },
}

/// The dirty log of a guest, switched on.
///
/// The pages in its sets are owed to the destination, in this order: [`harvest`](Self::harvest), then [`clear`](Self::clear), then read
/// the page. Once the guest stands still nothing can write behind a reader, and the last pages are read without being cleared.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    ram: GuestRam,
    /// With manual protect: the pages whose bits in the log are known to be set, and were handed out. Without: always empty.
    reported: PageSet,
    manual_protect: bool,
}

impl DirtyLog {
    /// Switches the log on for every slot of `ram` in `vm` and adds to `into` the pages that hold anything: what a first pass sends.
    ///
    /// Every page that is not added is zero until a harvest finds it. Device writes that nobody has harvested are forgotten: their
    /// pages are populated, and so among those to be sent.
    pub fn start(vm: Arc<VmFd>, ram: GuestRam, into: &mut PageSet) -> Result<Self, DirtyLogError> {
        // KVM looks at the capability when the log of a slot is switched on, so here is early enough, and a guest that never migrates
        // goes without.
        let flags = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        let capability = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args: [flags, 0, 0, 0], ..Default::default() };
        let manual_protect = vm.enable_cap(&capability).is_ok();
        let mut log = DirtyLog { vm, reported: PageSet::empty(ram.pages()), manual_protect, ram };
        log.ram.take_device_writes(&mut PageSet::empty(log.ram.pages()));
        if let Err(error) = log.switch(true).and_then(|()| log.collect_populated(into)) {
            // Best effort: the guest is better off without a log that nobody reads.
            let _ = log.switch(false);
            return Err(error);
        }
        Ok(log)
    }

    fn collect_populated(&mut self, into: &mut PageSet) -> Result<(), DirtyLogError> {
        let all = PageRun::new(0, self.ram.pages());
        let mut touched = PageSet::empty(self.ram.pages());
        populated(&self.ram, &mut touched);
        if self.manual_protect {
            // The bits of untouched pages are set as well. Cleared here (nothing is mapped, so that is cheap), they tell of first
            // touches from now on; touches between the scan and the clear are found by scanning once more, after it.
            self.reported.insert(all);
            let mut untouched = self.reported.clone();
            untouched.subtract(&touched);
            self.clear(&untouched, all)?;
            populated(&self.ram, &mut touched);
        }
        into.union(&touched);
        Ok(())
    }

    /// Adds to `into` the pages that were written since they were last cleared; returns how many of them `into` did not have.
    ///
    /// A page is reported once until it is cleared. Call it again after the guest has stopped and its devices' state has been saved,
    /// because saving can write guest RAM.
    pub fn harvest(&mut self, into: &mut PageSet) -> Result<u64, DirtyLogError> {
        let before = into.len();
        for slot in self.ram.slots() {
            let log = self.vm.get_dirty_log(slot.slot, slot.run.bytes() as usize);
            let log = log.map_err(|source| DirtyLogError::Get { slot: slot.slot, source })?;
            // Slots begin at a multiple of 64 pages, so words line up.
            let base = (slot.run.first.0 / WORD) as usize;
            for (index, bits) in (base..).zip(log).filter(|(_, bits)| *bits != 0) {
                let known = self.reported.words().get(index).copied().unwrap_or(0);
                into.insert_word(index, bits & !known);
                if self.manual_protect {
                    self.reported.insert_word(index, bits);
                }
            }
        }
        // Their bitmap forgets what it hands out, so these are always reported.
        self.ram.take_device_writes(into);
        Ok(into.len() - before)
    }

    /// Makes writes to the pages of `pages` that lie within `range` show in the next harvest again. Must come before their contents are
    /// read: a write between reading and clearing would be lost.
    ///
    /// KVM flushes the guest's TLBs once a call, so a range is better larger than a run: some MiB.
    pub fn clear(&mut self, pages: &PageSet, range: PageRun) -> Result<(), DirtyLogError> {
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

    /// Switches the log off. KVM gives the guest its huge pages back, which takes milliseconds a GiB: never inside the blackout.
    /// Without it (the guest has moved) the log goes with the VM.
    pub fn stop(self) -> Result<(), DirtyLogError> {
        self.switch(false)
    }

    fn switch(&self, on: bool) -> Result<(), DirtyLogError> {
        for slot in self.ram.slots() {
            let Some(address) = self.ram.host_address(slot.run) else { continue };
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: slot.start.0,
                memory_size: slot.run.bytes(),
                userspace_addr: address.as_ptr() as u64,
            };
            // SAFETY: the region is the slot as the VM was built with it; only its flags change. `ram` outlives this call, and the VM
            // keeps its own hold on the memory.
            unsafe { self.vm.set_user_memory_region(region) }.map_err(|source| DirtyLogError::Switch { on, slot: slot.slot, source })?;
        }
        Ok(())
    }

    /// Clears the bits of `pages` within `run`, which lies in `slot`, as far as they are known to be set: a bit set since the last
    /// harvest stands for a write that nobody has been told of.
    fn clear_in_slot(&mut self, slot: RamSlot, pages: &PageSet, run: PageRun) -> Result<(), DirtyLogError> {
        let first_word = run.first.0 / WORD;
        let bits: Vec<u64> = (first_word..run.end().div_ceil(WORD))
            .map(|index| {
                let word = |set: &PageSet| set.words().get(index as usize).copied().unwrap_or(0);
                word(pages) & word(&self.reported) & mask_of_word(run, index)
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
            return Err(DirtyLogError::Clear { slot: slot.slot, run, source: io::Error::last_os_error() });
        }
        for (index, bits) in (first_word..).zip(bits) {
            self.reported.remove_word(index as usize, bits);
        }
        Ok(())
    }
}

/// The bits of word `index` of a set that stand for pages of `run`.
fn mask_of_word(run: PageRun, index: u64) -> u64 {
    let start = run.first.0.saturating_sub(index * WORD).min(WORD);
    let end = run.end().saturating_sub(index * WORD).min(WORD);
    let below = |bit: u64| if bit == WORD { !0 } else { (1u64 << bit) - 1 };
    below(end) & !below(start)
}

#[cfg(test)]
mod tests;
