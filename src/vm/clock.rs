//! The guest's clocks over a move: kvmclock and the TSC.
//!
//! kvmclock. KVM_GET_CLOCK reports it together with the host's wall clock where the host keeps time by its TSC (KVM_CLOCK_REALTIME).
//! KVM_SET_CLOCK given that wall clock adds what has passed since by the destination's wall clock, never less than nothing: the guest's
//! time stays true over the blackout, as true as the two hosts' wall clocks agree. Without it the guest's time stands still meanwhile.
//!
//! TSC. It moves on by exactly as much as kvmclock did, because guests read one by means of the other: the target is the TSC that went
//! with the saved clock plus the clock's progress in cycles. As the clock's progress is never negative, the TSC never goes backwards. All
//! vCPUs' offsets are moved by the same amount, which keeps their differences: KVM needs equal offsets for its master clock
//! (Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET).

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::state::Abi;
use super::{VmError, ioctls, msr};

/// The clocks of a paused machine.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ClockState {
    kvm: Abi<kvm_clock_data>,
    /// TSC of vCPU 0 when `kvm` was read.
    tsc: u64,
}

/// What becomes of a vCPU's TSC.
#[derive(Clone, Copy, Debug)]
pub enum TscPlan {
    /// Its saved offset is changed by this much (modulo 2^64).
    ShiftOffset(u64),
    /// KVM tells no offsets: its saved value is changed by this many cycles.
    Advance(u64),
}

/// Reads the clocks on the thread of vCPU 0. `scaled`: the guest's TSC runs at another rate than the host's.
pub fn save(vm: &VmFd, vcpu: &VcpuFd, scaled: bool) -> Result<ClockState, VmError> {
    let (kvm, tsc) = read(vm, vcpu, scaled)?;
    Ok(ClockState { kvm: Abi(kvm), tsc })
}

/// Sets kvmclock from `saved` and says how the TSCs follow, on the thread of vCPU 0, whose saved TSC offset is `offset`. Comes before the
/// vCPUs are restored: arming TSC_DEADLINE needs a TSC that is right.
pub fn restore(vm: &VmFd, vcpu: &VcpuFd, saved: &ClockState, offset: Option<u64>, khz: u32, scaled: bool) -> Result<TscPlan, VmError> {
    let flags = saved.kvm.0.flags & KVM_CLOCK_REALTIME & vm.check_extension_int(Cap::AdjustClock) as u32;
    let clock = kvm_clock_data { clock: saved.kvm.0.clock, flags, realtime: saved.kvm.0.realtime, ..Default::default() };
    vm.set_clock(&clock).map_err(VmError::kvm("KVM_SET_CLOCK"))?;
    let (now, tsc_now) = read(vm, vcpu, scaled)?;
    let passed = now.clock.saturating_sub(saved.kvm.0.clock);
    let cycles = (u128::from(passed) * u128::from(khz) / 1_000_000) as u64;
    let target = saved.tsc.wrapping_add(cycles);
    match (offset, ioctls::tsc_offset(vcpu)) {
        (Some(saved_offset), Ok(current)) => {
            let wanted = current.wrapping_add(target.wrapping_sub(tsc_now));
            Ok(TscPlan::ShiftOffset(wanted.wrapping_sub(saved_offset)))
        }
        _ => Ok(TscPlan::Advance(cycles)),
    }
}

/// kvmclock, and the guest's TSC at the same moment, or just after it where KVM does not report the host's TSC with its clock.
fn read(vm: &VmFd, vcpu: &VcpuFd, scaled: bool) -> Result<(kvm_clock_data, u64), VmError> {
    let clock = vm.get_clock().map_err(VmError::kvm("KVM_GET_CLOCK"))?;
    if clock.flags & KVM_CLOCK_HOST_TSC != 0
        && !scaled
        && let Ok(offset) = ioctls::tsc_offset(vcpu)
    {
        return Ok((clock, clock.host_tsc.wrapping_add(offset)));
    }
    let tsc = msr::get(vcpu, &[msr::TSC])?;
    Ok((clock, tsc.first().map_or(0, |msr| msr.value)))
}
