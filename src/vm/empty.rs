//! What KVM needs for a machine of any configuration: it can be created before anything of the guest is known. Creating a machine takes KVM
//! milliseconds, in which it waits for all processors.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VmFd};

use super::{VmError, layout};

/// A virtual machine with interrupt controllers and a timer, and with neither memory nor vCPUs.
pub struct EmptyVm {
    pub(super) kvm: Kvm,
    pub(super) fd: VmFd,
}

impl EmptyVm {
    /// Creates one.
    pub fn create() -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(VmError::Open)?;
        let fd = kvm.create_vm().map_err(VmError::kvm("KVM_CREATE_VM"))?;
        // Intel hosts need both addresses before the first vCPU; others ignore them.
        fd.set_identity_map_address(layout::IDENTITY_MAP).map_err(VmError::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::TSS as usize).map_err(VmError::kvm("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(VmError::kvm("KVM_CREATE_IRQCHIP"))?;
        // The dummy speaker is port 0x61, which guests read to see the timer run.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(VmError::kvm("KVM_CREATE_PIT2"))?;
        Ok(EmptyVm { kvm, fd })
    }
}
