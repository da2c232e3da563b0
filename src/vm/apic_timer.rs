//! The local APIC's timer over a move. It counts at a fixed rate as the TSC does, so it moves on by as much: a guest that waits for it wakes
//! when its time has come, and not later by the blackout. TSC_DEADLINE needs none of this: it names a time.
//!
//! Registers and modes: Intel SDM volume 3, 12.5.4.

use std::time::Duration;

use kvm_bindings::kvm_lapic_state;

const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE_CONFIGURATION: usize = 0x3e0;
/// Of KVM's APIC timer before it is divided (KVM API, KVM_CAP_X86_APIC_BUS_CYCLES_NS, its default).
const NANOSECONDS_PER_CYCLE: u64 = 1;

/// `saved` when its time has moved on by `passed`. A timer that is due by then goes off at once, a periodic one once.
pub fn after(saved: &kvm_lapic_state, passed: Duration) -> kvm_lapic_state {
    let mut lapic = *saved;
    let left = u64::from(register(saved, CURRENT_COUNT));
    // It does not run, or has gone off.
    if left == 0 || register(saved, INITIAL_COUNT) == 0 {
        return lapic;
    }
    let nanoseconds = NANOSECONDS_PER_CYCLE << divider_shift(register(saved, DIVIDE_CONFIGURATION));
    let counts = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX) / nanoseconds;
    // Not 0, which would mean that it does not run.
    let left = left.saturating_sub(counts).max(1) as u32;
    for (to, from) in lapic.regs.iter_mut().skip(CURRENT_COUNT).zip(left.to_le_bytes()) {
        *to = from as _;
    }
    lapic
}

fn register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(lapic.regs.iter().skip(offset)) {
        *to = *from as u8;
    }
    u32::from_le_bytes(bytes)
}

/// By which power of two the configuration divides: bits 0, 1 and 3 are that less one, modulo 8.
fn divider_shift(configuration: u32) -> u32 {
    ((configuration & 3 | (configuration & 8) >> 1) + 1) & 7
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timer(initial: u32, current: u32, divide: u32) -> kvm_lapic_state {
        let mut lapic = kvm_lapic_state::default();
        for (offset, value) in [(INITIAL_COUNT, initial), (CURRENT_COUNT, current), (DIVIDE_CONFIGURATION, divide)] {
            for (to, from) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
                *to = from as _;
            }
        }
        lapic
    }

    #[test]
    fn a_timer_moves_on_and_is_never_forgotten() {
        let left = |lapic, passed| register(&after(&lapic, Duration::from_nanos(passed)), CURRENT_COUNT);
        assert_eq!(left(timer(1_000_000, 600_000, 0b1011), 250_000), 350_000);
        assert_eq!(left(timer(1_000_000, 600_000, 0b1011), 600_000), 1);
        assert_eq!(left(timer(1_000_000, 600_000, 0b1011), u64::MAX), 1);
        assert_eq!(left(timer(1000, 600, 0b0000), 200), 500, "divided by 2");
        assert_eq!(left(timer(1000, 600, 0b1010), 12800), 500, "divided by 128");
        assert_eq!(left(timer(1000, 0, 0b1011), 100), 0, "it had gone off");
        assert_eq!(left(timer(0, 0, 0b1011), 100), 0);
    }
}
