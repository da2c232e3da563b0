//! The guest's clocks over a move: kvmclock and the TSC.
//!
//! kvmclock. It is saved together with the host's wall clock: KVM's own reading (KVM_CLOCK_REALTIME) where the host keeps time by its TSC,
//! one taken beside it otherwise. The destination adds what has passed since by its wall clock, never less than nothing: the guest's time
//! stays true over the blackout, as true as the two hosts' wall clocks agree. What the destination knows better from its own monotonic
//! clock (see [`MachineState::bound_blackout`]) bounds the disagreement.
//!
//! TSC. It moves on by exactly as much as kvmclock did, because guests read one by means of the other: the target is the TSC that went
//! with the saved clock plus the clock's progress in cycles. As the clock's progress is never negative, the TSC never goes backwards. All
//! vCPUs' offsets are moved by the same amount, which keeps their differences: KVM needs equal offsets for its master clock
//! (Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET).
//!
//! The local APICs' timers, which count as the TSC does, move on as well; see [`super::apic_timer`].

use std::ops::RangeInclusive;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::state::{Abi, MachineState};
use super::{VmError, ioctls, msr};

/// The clocks of a paused machine.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ClockState {
    kvm: Abi<kvm_clock_data>,
    /// TSC of vCPU 0 when `kvm` was read.
    tsc: u64,
    #[serde(skip)]
    blackout: Option<(Duration, Duration)>,
}

impl MachineState {
    /// Tells how long ago the state was saved at least and at most, as far as the destination knows without trusting either wall clock:
    /// at least since it received the state, at most since it last received something that the source sent before it saved it, latency
    /// added. Counted at the time of the call, which is to come just before the restore.
    pub fn bound_blackout(&mut self, bounds: RangeInclusive<Duration>) {
        self.clock.blackout = Some((*bounds.start(), *bounds.end()));
    }
}

/// How a vCPU's clocks follow the machine's.
#[derive(Clone, Copy, Debug)]
pub struct ClockPlan {
    /// What becomes of its TSC.
    pub tsc: TscPlan,
    /// How far the guest's time has moved on since it was saved.
    pub passed: Duration,
}

/// What becomes of a vCPU's TSC.
#[derive(Clone, Copy, Debug)]
pub enum TscPlan {
    /// Its saved offset is changed by this much (modulo 2^64).
    ShiftOffset(u64),
    /// KVM tells no offsets: its saved value is changed by this many cycles.
    Advance(u64),
}

/// Reads the clocks, with vCPU 0, whose TSC offset is `offset`. `scaled`: the guest's TSC runs at another rate than the host's.
pub fn save(vm: &VmFd, vcpu: &VcpuFd, offset: Option<u64>, scaled: bool) -> Result<ClockState, VmError> {
    let (mut kvm, tsc) = read(vm, vcpu, offset, scaled)?;
    if kvm.flags & KVM_CLOCK_REALTIME == 0 {
        kvm.realtime = nanoseconds(wall_clock());
    }
    Ok(ClockState { kvm: Abi(kvm), tsc, blackout: None })
}

/// Sets kvmclock from `saved` and says how the TSCs follow, with vCPU 0, whose saved TSC offset is `offset`. Comes before the
/// vCPUs are restored: arming TSC_DEADLINE needs a TSC that is right.
pub fn restore(vm: &VmFd, vcpu: &VcpuFd, saved: &ClockState, offset: Option<u64>, khz: u32, scaled: bool) -> Result<ClockPlan, VmError> {
    let (least, most) = saved.blackout.unwrap_or((Duration::ZERO, Duration::MAX));
    let data = saved.kvm.0;
    let now = wall_clock();
    let passed = now.saturating_sub(Duration::from_nanos(data.realtime)).min(most).max(least);
    let clock = if vm.check_extension_int(Cap::AdjustClock) as u32 & KVM_CLOCK_REALTIME != 0 {
        // Lets KVM add what this call takes.
        let realtime = nanoseconds(now.saturating_sub(passed));
        kvm_clock_data { clock: data.clock, flags: KVM_CLOCK_REALTIME, realtime, ..Default::default() }
    } else {
        kvm_clock_data { clock: data.clock.saturating_add(nanoseconds(passed)), ..Default::default() }
    };
    vm.set_clock(&clock).map_err(VmError::kvm("KVM_SET_CLOCK"))?;
    let current = ioctls::tsc_offset(vcpu).ok();
    let (now, tsc_now) = read(vm, vcpu, current, scaled)?;
    let passed = now.clock.saturating_sub(data.clock);
    let cycles = (u128::from(passed) * u128::from(khz) / 1_000_000) as u64;
    let target = saved.tsc.wrapping_add(cycles);
    let tsc = match (offset, current) {
        (Some(saved_offset), Some(current)) => {
            let wanted = current.wrapping_add(target.wrapping_sub(tsc_now));
            TscPlan::ShiftOffset(wanted.wrapping_sub(saved_offset))
        }
        _ => TscPlan::Advance(cycles),
    };
    Ok(ClockPlan { tsc, passed: Duration::from_nanos(passed) })
}

fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// kvmclock, and the guest's TSC at the same moment, or just after it where KVM does not report the host's TSC with its clock. `offset` is
/// the vCPU's, where KVM tells it.
fn read(vm: &VmFd, vcpu: &VcpuFd, offset: Option<u64>, scaled: bool) -> Result<(kvm_clock_data, u64), VmError> {
    let clock = vm.get_clock().map_err(VmError::kvm("KVM_GET_CLOCK"))?;
    if clock.flags & KVM_CLOCK_HOST_TSC != 0
        && !scaled
        && let Some(offset) = offset
    {
        return Ok((clock, clock.host_tsc.wrapping_add(offset)));
    }
    let tsc = msr::get(vcpu, &[msr::TSC])?;
    Ok((clock, tsc.first().map_or(0, |msr| msr.value)))
}

#[cfg(test)]
impl ClockState {
    /// kvmclock in nanoseconds.
    pub(super) fn nanoseconds(&self) -> u64 {
        self.kvm.0.clock
    }

    /// Makes the state look as if the source's wall clock were `seconds` behind.
    pub(super) fn age(&mut self, seconds: u64) {
        self.kvm.0.realtime -= seconds * 1_000_000_000;
    }
}
