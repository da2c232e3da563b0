//! Reading a parked vCPU's state. The order matters and is given with its reasons.

use std::sync::Arc;

use kvm_bindings::{Xsave, kvm_cpuid_entry2, kvm_xsave};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use zerocopy::IntoBytes;

use super::state::{Abi, VcpuState};
use super::{VmError, ioctls, msr};

/// Bytes of extended processor state that KVM reads and writes here.
pub fn xsave_size(vm: &VmFd) -> Result<usize, VmError> {
    match vm.check_extension_int(Cap::Xsave2) {
        ..=0 => Err(VmError::Missing("KVM_CAP_XSAVE2")),
        size => Ok((size as usize).max(size_of::<kvm_xsave>())),
    }
}

/// What is known of a vCPU without asking KVM, each question to which takes some 10 us of the blackout where KVM has no VMX or SVM.
#[derive(Clone)]
pub struct Known {
    /// The MSRs that it has.
    pub msrs: Arc<[u32]>,
    /// Bytes of its extended state (KVM_CAP_XSAVE2).
    pub xsave_size: usize,
    /// What it was given as CPUID. What KVM makes of its registers is not in here, see [`super::cpuid::are_alike`].
    pub cpuid: Arc<[kvm_cpuid_entry2]>,
    /// The rate of its TSC.
    pub tsc_khz: u32,
}

/// Reads the state.
pub fn save(vcpu: &VcpuFd, known: &Known) -> Result<VcpuState, VmError> {
    // First: KVM takes pending INIT and start-up interrupts here, which changes registers and the local APIC.
    let mp_state = vcpu.get_mp_state().map_err(VmError::kvm("KVM_GET_MP_STATE"))?;
    let regs = vcpu.get_regs().map_err(VmError::kvm("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(VmError::kvm("KVM_GET_SREGS"))?;
    let xsave = xsave(vcpu, known.xsave_size)?;
    let xcrs = vcpu.get_xcrs().map_err(VmError::kvm("KVM_GET_XCRS"))?;
    let debug_regs = vcpu.get_debug_regs().map_err(VmError::kvm("KVM_GET_DEBUGREGS"))?;
    let lapic = vcpu.get_lapic().map_err(VmError::kvm("KVM_GET_LAPIC"))?;
    let tsc_offset = ioctls::tsc_offset(vcpu).ok();
    let msrs = msr::get(vcpu, &known.msrs)?;
    // Last: nothing read above may add to the pending exceptions and interrupts after they were read.
    let events = vcpu.get_vcpu_events().map_err(VmError::kvm("KVM_GET_VCPU_EVENTS"))?;
    Ok(VcpuState {
        mp_state: Abi(mp_state),
        regs: Abi(regs),
        sregs: Abi(sregs),
        xsave,
        xcrs: Abi(xcrs),
        debug_regs: Abi(debug_regs),
        lapic: Abi(lapic),
        tsc_khz: known.tsc_khz,
        tsc_offset,
        cpuid: known.cpuid.iter().copied().map(Abi).collect(),
        msrs,
        events: Abi(events),
    })
}

fn xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u8>, VmError> {
    let mut area = xsave_area(size)?;
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says that KVM writes, and no feature that enlarges it is enabled later.
    unsafe { vcpu.get_xsave2(&mut area) }.map_err(VmError::kvm("KVM_GET_XSAVE2"))?;
    let mut bytes = area.as_fam_struct_ref().xsave.region.as_bytes().to_vec();
    bytes.extend_from_slice(area.as_slice().as_bytes());
    bytes.truncate(size);
    Ok(bytes)
}

/// A zeroed area that holds at least `size` bytes.
pub(super) fn xsave_area(size: usize) -> Result<Xsave, VmError> {
    let extra = size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    Xsave::new(extra).map_err(|_| VmError::OutOfMemory)
}
