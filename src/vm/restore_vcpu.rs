//! Writing saved state into a fresh, parked vCPU. The order matters and is given with its reasons.

use kvm_bindings::{CpuId, kvm_debugregs};
use kvm_ioctls::VcpuFd;
use zerocopy::IntoBytes;

use super::apic_timer;
use super::clock::{ClockPlan, TscPlan};
use super::msr::Msr;
use super::save_vcpu::{Known, xsave_area};
use super::state::{StateError, VcpuState};
use super::{VmError, cpuid, ioctls, msr};

/// What a reset makes of the debug registers (Intel SDM, volume 3, table 10-1).
const RESET_DEBUG_REGS: kvm_debugregs = kvm_debugregs { db: [0; 4], dr6: 0xffff_0ff0, dr7: 0x400, flags: 0, reserved: [0; 9] };

/// Sets what decides how the rest of the state is understood: the features that the guest may use, and the TSC's rate. Comes before the
/// clocks are restored, which count in that rate. `known` is what the vCPU was built with; returns what it is now.
pub fn prepare(vcpu: &VcpuFd, state: &VcpuState, mut known: Known) -> Result<Known, VmError> {
    let cpuid: Vec<_> = state.cpuid.iter().map(|entry| entry.0).collect();
    // The machine was built with what this host gives, most often the same; setting it again takes KVM 80 us.
    if !cpuid::are_alike(&cpuid, &known.cpuid) {
        let cpuid = CpuId::from_entries(&cpuid).map_err(|_| VmError::TooManyCpuidEntries(cpuid.len()))?;
        vcpu.set_cpuid2(&cpuid).map_err(VmError::kvm("KVM_SET_CPUID2"))?;
        known.cpuid = cpuid.as_slice().into();
    }
    // Refused by KVM if the rates are more than 250 ppm apart and the processor cannot scale.
    if known.tsc_khz != state.tsc_khz {
        vcpu.set_tsc_khz(state.tsc_khz).map_err(VmError::kvm("KVM_SET_TSC_KHZ"))?;
        known.tsc_khz = state.tsc_khz;
    }
    Ok(known)
}

/// Writes the rest of the state after [`prepare`], into a vCPU that was built with `known`.
pub fn restore(vcpu: &VcpuFd, state: &VcpuState, known: &Known, clocks: ClockPlan) -> Result<(), VmError> {
    vcpu.set_mp_state(state.mp_state.0).map_err(VmError::kvm("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&state.regs.0).map_err(VmError::kvm("KVM_SET_REGS"))?;
    vcpu.set_sregs(&state.sregs.0).map_err(VmError::kvm("KVM_SET_SREGS"))?;
    set_xsave(vcpu, &state.xsave, known.xsave_size)?;
    // KVM gives none on a host without XSAVE, and there refuses even to set none.
    if state.xcrs.0.nr_xcrs > 0 {
        vcpu.set_xcrs(&state.xcrs.0).map_err(VmError::kvm("KVM_SET_XCRS"))?;
    }
    // The vCPU is fresh, so what a reset makes of them is there.
    if state.debug_regs.0 != RESET_DEBUG_REGS {
        vcpu.set_debug_regs(&state.debug_regs.0).map_err(VmError::kvm("KVM_SET_DEBUGREGS"))?;
    }
    // After SREGS, which carry the APIC's base address and mode. Before the MSRs, because TSC_DEADLINE is refused unless the APIC's timer
    // is in that mode.
    vcpu.set_lapic(&apic_timer::after(&state.lapic.0, clocks.passed)).map_err(VmError::kvm("KVM_SET_LAPIC"))?;
    if let Some(unknown) = state.msrs.iter().find(|msr| !known.msrs.contains(&msr.index)) {
        return Err(StateError::Msr(unknown.index).into());
    }
    set_msrs(vcpu, state, clocks.tsc)?;
    // Last: KVM_SET_REGS drops pending exceptions.
    vcpu.set_vcpu_events(&state.events.0).map_err(VmError::kvm("KVM_SET_VCPU_EVENTS"))
}

/// TSC first, TSC_DEADLINE last: it starts a timer against the TSC as it is then.
fn set_msrs(vcpu: &VcpuFd, state: &VcpuState, plan: TscPlan) -> Result<(), VmError> {
    let cycles = match (plan, state.tsc_offset) {
        (TscPlan::ShiftOffset(shift), Some(offset)) => {
            ioctls::set_tsc_offset(vcpu, offset.wrapping_add(shift)).map_err(VmError::kvm("KVM_VCPU_TSC_OFFSET"))?;
            None
        }
        (TscPlan::Advance(cycles), _) => Some(cycles),
        (TscPlan::ShiftOffset(_), None) => Some(0),
    };
    let (tsc, others): (Vec<Msr>, Vec<Msr>) = state.msrs.iter().partition(|msr| msr.index == msr::TSC);
    let (deadline, others): (Vec<Msr>, Vec<Msr>) = others.into_iter().partition(|msr| msr.index == msr::TSC_DEADLINE);
    let tsc = cycles.map_or_else(Vec::new, |cycles| tsc.iter().map(|msr| Msr { value: msr.value.wrapping_add(cycles), ..*msr }).collect());
    msr::set(vcpu, &[tsc, others, deadline].concat())
}

/// A shorter area than this host's is one of fewer features, whose absence the XSAVE header says.
fn set_xsave(vcpu: &VcpuFd, bytes: &[u8], host: usize) -> Result<(), VmError> {
    if bytes.len() > host {
        return Err(StateError::Xsave { saved: bytes.len(), host }.into());
    }
    let mut area = xsave_area(host)?;
    let (legacy, extra) = bytes.split_at(bytes.len().min(4096));
    // SAFETY: only the contents of the legacy region are changed, not the length of the area.
    let region = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    for (to, from) in region.as_mut_bytes().iter_mut().zip(legacy) {
        *to = *from;
    }
    for (to, from) in area.as_mut_slice().as_mut_bytes().iter_mut().zip(extra) {
        *to = *from;
    }
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says that KVM reads.
    unsafe { vcpu.set_xsave2(&area) }.map_err(VmError::kvm("KVM_SET_XSAVE"))
}
