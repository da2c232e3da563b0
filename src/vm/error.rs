//! What can go wrong with a virtual machine.

use thiserror::Error;

use super::events::VmEvent;
use super::msr::Msr;
use super::state::StateError;
use crate::boot::BootError;
use crate::device::DeviceError;
use crate::device::bus::Overlap;
use crate::memory::dirty_tracker::TrackerError;

/// Why a virtual machine could not be built, moved on or saved.
#[derive(Debug, Error)]
pub enum VmError {
    /// No KVM.
    #[error("cannot open /dev/kvm: {0}; load the kvm module of this processor, or get access to the device")]
    Open(kvm_ioctls::Error),
    /// A KVM call failed.
    #[error("{call} failed: {source}")]
    Kvm {
        /// Its name in the KVM API.
        call: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// KVM lacks something without which no guest can run here.
    #[error("this host's KVM lacks {0}; a newer kernel has it")]
    Missing(&'static str),
    /// No vCPU, or more than KVM takes.
    #[error("{asked} vCPUs asked for; this host's KVM takes 1 to {max}")]
    CpuCount {
        /// What was asked for.
        asked: u16,
        /// KVM's limit.
        max: usize,
    },
    /// The CPUID table outgrew KVM's.
    #[error("the guest's processor description has {0} CPUID entries, more than KVM takes")]
    TooManyCpuidEntries(usize),
    /// A kernel structure could not be allocated.
    #[error("out of memory for a KVM structure")]
    OutOfMemory,
    /// The thread of a vCPU could not be started.
    #[error("cannot start the thread of vCPU {index}: {source}")]
    VcpuThread {
        /// Which vCPU.
        index: u16,
        /// What the system said.
        source: std::io::Error,
    },
    /// The thread of a vCPU ended by a defect.
    #[error("the thread of vCPU {0} is gone")]
    VcpuGone(u16),
    /// A vCPU did not stop in time.
    #[error("vCPU {0} did not stop in time; it waits for a device, its output or a page of memory")]
    PauseTimeout(u16),
    /// What a vCPU's save or restore met, with the vCPU's number.
    #[error("vCPU {index}: {source}")]
    Vcpu {
        /// Which vCPU.
        index: u16,
        /// What failed.
        source: Box<VmError>,
    },
    /// An MSR that KVM offered could not be read.
    #[error("MSR {0:#x} cannot be read")]
    MsrRead(u32),
    /// An MSR could not be given its saved value.
    #[error("MSR {:#x} cannot be set to {:#x} on this host", .0.index, .0.value)]
    MsrWrite(Msr),
    /// The guest ended, so there is nothing to save.
    #[error("the guest has ended and cannot be saved: {0}")]
    Ended(VmEvent),
    /// The saved state does not fit this machine.
    #[error("saved machine state: {0}")]
    State(#[from] StateError),
    /// The kernel or something with it cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The machine cannot be built for the dirty tracking that was asked for.
    #[error(transparent)]
    Tracking(#[from] TrackerError),
    /// A device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Two devices have one address.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// There is no such slot for a virtio device, or it is taken.
    #[error("virtio slot {0} is taken or does not exist; a guest has {max} of them", max = super::layout::VIRTIO_SLOTS)]
    Slot(usize),
    /// A descriptor for interrupts could not be made.
    #[error("cannot create an eventfd: {0}")]
    EventFd(std::io::Error),
}

impl VmError {
    /// For `map_err` after the KVM call `call`.
    pub(super) fn kvm(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| VmError::Kvm { call, source }
    }
}
