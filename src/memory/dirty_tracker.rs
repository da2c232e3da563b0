//! Which pages the guest and its devices have changed, by whichever of KVM's two means the machine was built for: the dirty log
//! ([`super::dirty_log`]) or the dirty ring ([`super::dirty_ring`]).
//!
//! The pages in a tracker's sets are owed to the destination, in this order: [`harvest`](DirtyTracker::harvest), then
//! [`clear`](DirtyTracker::clear), then read the page. Once the guest stands still nothing can write behind a reader, and the last pages
//! are read without being cleared.

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;

use super::dirty_log::DirtyLog;
use super::dirty_ring::{self, DirtyRings, RingTracker};
use super::{GuestRam, PageRun, PageSet};

const _: () = assert!(size_of::<kvm_userspace_memory_region>() == 32);

/// Why dirty pages could not be tracked. Unless it says otherwise that ends the migration, and the guest itself is unharmed.
#[derive(Debug, Error)]
pub enum TrackerError {
    /// Tracking could not be switched on or off.
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
    /// This KVM has no dirty ring. The machine cannot be built as asked.
    #[error("this host's KVM has no dirty ring (KVM_CAP_DIRTY_LOG_RING, Linux 5.11); use --dirty-tracking log")]
    NoRing,
    /// The rings could not be enabled. The machine cannot be built as asked.
    #[error("cannot enable dirty rings of {entries} entries: {source}; use --dirty-tracking log")]
    Enable {
        /// How long each was to be.
        entries: u32,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// The host's page tables do not tell which pages exist.
    #[error("cannot tell what the guest has touched of {run}: {source}")]
    Scan {
        /// The pages.
        run: PageRun,
        /// What the kernel said.
        source: io::Error,
    },
    /// A vCPU's ring could not be mapped. The machine cannot be built as asked.
    #[error("cannot map the dirty ring of a vCPU: {0}; use --dirty-tracking log")]
    Map(io::Error),
    /// A ring names a page that the guest does not have.
    #[error("KVM's dirty ring has an entry for page {offset:#x} of memory slot {slot:#x}, which does not exist")]
    Entry {
        /// Address space and slot number, as the ring has them.
        slot: u32,
        /// Page within the slot.
        offset: u64,
    },
    /// KVM wrote over entries before they were taken. Nobody knows which pages were in them, and the guest may not be able to go on.
    #[error(
        "KVM has overrun a dirty ring, as one that emulates the guest's kernel mode in software can; start the guest with \
         --dirty-tracking log to move it"
    )]
    Overrun,
    /// The entries could not be handed back to KVM. A vCPU whose ring is full cannot go on.
    #[error("cannot reset the dirty rings: {0}")]
    Reset(io::Error),
}

/// What a machine is to be built for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrackerChoice {
    /// What costs less: the log where KVM has manual protect, otherwise the ring. With manual protect nothing is protected when tracking
    /// begins, and later only what is about to be sent, a few MiB at a time; the ring protects all of RAM at the beginning, and with
    /// every harvest each page that it finds by itself (measured: `tests/bench/dirty_tracking.rs`). A log without manual protect does
    /// both as well, and is read whole besides.
    #[default]
    Auto,
    /// The dirty log.
    Log,
    /// The dirty ring; a host that has none cannot run the machine.
    Ring,
}

/// How the dirty pages of one machine can be tracked. Settled when it is built: KVM takes the choice before the first vCPU only.
#[derive(Clone)]
pub enum Tracking {
    /// By the dirty log of this VM.
    Log(Arc<VmFd>),
    /// By the dirty rings of its vCPUs.
    Ring(Arc<DirtyRings>),
}

impl Tracking {
    /// Prepares `vm`, which has no vCPU yet, for what `choice` asks; `ram` is what its memory slots show. A KVM that emulates the guest's
    /// kernel mode does much of it between two looks at its rings, and can overrun them.
    pub fn new(choice: TrackerChoice, vm: &Arc<VmFd>, ram: &GuestRam, emulates_ring_0: bool) -> Result<Self, TrackerError> {
        let wanted = match choice {
            TrackerChoice::Auto => vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) <= 0 && !emulates_ring_0,
            TrackerChoice::Log => false,
            TrackerChoice::Ring => true,
        };
        if !wanted {
            return Ok(Tracking::Log(vm.clone()));
        }
        match DirtyRings::enable(vm.clone(), ram.clone(), dirty_ring::ENTRIES) {
            Ok(rings) => Ok(Tracking::Ring(Arc::new(rings))),
            Err(_) if choice == TrackerChoice::Auto => Ok(Tracking::Log(vm.clone())),
            Err(error) => Err(error),
        }
    }

    /// KVM's descriptor of the machine.
    pub fn vm(&self) -> &Arc<VmFd> {
        match self {
            Tracking::Log(vm) => vm,
            Tracking::Ring(rings) => rings.vm(),
        }
    }

    /// Takes a new vCPU in, before it runs.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), TrackerError> {
        match self {
            Tracking::Log(_) => Ok(()),
            Tracking::Ring(rings) => rings.add(vcpu),
        }
    }

    /// Begins to track the pages of `ram` and adds to `into` those that hold anything: what a first pass sends.
    ///
    /// Every page that is not added is zero until a harvest finds it. Device writes that nobody has harvested are forgotten: their
    /// pages are populated, and so among those to be sent.
    pub fn start(&self, ram: &GuestRam, into: &mut PageSet) -> Result<DirtyTracker, TrackerError> {
        match self {
            Tracking::Log(vm) => DirtyLog::start(vm.clone(), ram.clone(), into).map(DirtyTracker::Log),
            Tracking::Ring(rings) => RingTracker::start(rings.clone(), into).map(DirtyTracker::Ring),
        }
    }
}

/// Tracking that has begun.
pub enum DirtyTracker {
    /// By the log.
    Log(DirtyLog),
    /// By the rings.
    Ring(RingTracker),
}

impl DirtyTracker {
    /// Adds to `into` the pages that were written since they were last cleared, or at least since the last harvest; returns how many of
    /// them `into` did not have.
    ///
    /// Call it again after the guest has stopped and its devices' state has been saved, because saving can write guest RAM.
    pub fn harvest(&mut self, into: &mut PageSet) -> Result<u64, TrackerError> {
        match self {
            DirtyTracker::Log(log) => log.harvest(into),
            DirtyTracker::Ring(ring) => ring.harvest(into),
        }
    }

    /// Makes writes to the pages of `pages` that lie within `range` show in the next harvest again. They are owed, and their contents are
    /// read after this: a write between reading and clearing would be lost.
    ///
    /// KVM flushes the guest's TLBs once a call, so a range is better larger than a run: some MiB.
    pub fn clear(&mut self, pages: &PageSet, range: PageRun) -> Result<(), TrackerError> {
        match self {
            DirtyTracker::Log(log) => log.clear(pages, range),
            DirtyTracker::Ring(ring) => ring.clear(pages, range),
        }
    }

    /// Ends the tracking. KVM gives the guest its huge pages back, which takes milliseconds a GiB: never inside the blackout. Without it
    /// (the guest has moved) the tracking goes with the VM.
    pub fn stop(self) -> Result<(), TrackerError> {
        match self {
            DirtyTracker::Log(log) => log.stop(),
            DirtyTracker::Ring(ring) => ring.stop(),
        }
    }
}

/// Switches dirty logging on or off for every slot of `ram`; the ring needs it like the log.
pub(super) fn switch(vm: &VmFd, ram: &GuestRam, on: bool) -> Result<(), TrackerError> {
    for slot in ram.slots() {
        let Some(address) = ram.host_address(slot.run) else { continue };
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.start.0,
            memory_size: slot.run.bytes(),
            userspace_addr: address.as_ptr() as u64,
        };
        // SAFETY: the region is the slot as the VM was built with it; only its flags change. `ram` outlives this call, and the VM
        // keeps its own hold on the memory.
        unsafe { vm.set_user_memory_region(region) }.map_err(|source| TrackerError::Switch { on, slot: slot.slot, source })?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod test_guest;
#[cfg(test)]
mod tests;
