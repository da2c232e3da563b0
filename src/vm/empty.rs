//! What KVM needs for a machine of any configuration: it can be created before anything of the guest is known.

use kvm_ioctls::{Kvm, VmFd};

use super::{VmError, layout};

/// A virtual machine with neither memory nor vCPUs.
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
        Ok(EmptyVm { kvm, fd })
    }
}
