//! Time is counted in TSC cycles; here their frequency is found.

use core::arch::x86_64::_rdtsc;

use super::boot::pvclock_words;
use super::port::{in8, out8};

/// The time stamp counter.
pub fn rdtsc() -> u64 {
    // SAFETY: always there in 64-bit mode, and open to ring 3.
    unsafe { _rdtsc() }
}

/// The TSC's frequency in Hz: from kvmclock where boot.s could switch it on, else measured with the PIT;
/// None if there is neither.
pub fn tsc_hz() -> Option<u64> {
    from_pvclock().or_else(from_pit)
}

/// kvmclock: nanoseconds are `(cycles << shift) * multiplier >> 32` (a right shift if negative).
fn from_pvclock() -> Option<u64> {
    let words = pvclock_words();
    let (version, multiplier, shift) = (words[0], words[6], words[7] as i8);
    if version == 0 || multiplier == 0 || !(-31..=31).contains(&shift) {
        return None;
    }
    let hz = (1_000_000_000_u128 << 32) / u128::from(multiplier);
    let hz = if shift < 0 { hz << -shift } else { hz >> shift };
    u64::try_from(hz).ok().filter(|&hz| hz > 0)
}

const PIT_HZ: u64 = 1_193_182;
const PIT_CHANNEL_0: u16 = 0x40;
const PIT_COMMAND: u16 = 0x43;
/// 40 ms, less than the counter takes to come round.
const PIT_COUNTS: u16 = 47_727;
const PIT_READS: u32 = 1_000_000;

fn pit_count() -> u16 {
    out8(PIT_COMMAND, 0);
    u16::from_le_bytes([in8(PIT_CHANNEL_0), in8(PIT_CHANNEL_0)])
}

fn from_pit() -> Option<u64> {
    // Channel 0, rate generator, over the full 16 bits.
    out8(PIT_COMMAND, 0x34);
    out8(PIT_CHANNEL_0, 0);
    out8(PIT_CHANNEL_0, 0);
    // A new count is taken over with the next tick.
    let fresh = pit_count();
    (0..PIT_READS).find(|_| pit_count() != fresh)?;
    let (first, start) = (pit_count(), rdtsc());
    for _ in 0..PIT_READS {
        let counts = first.wrapping_sub(pit_count());
        let cycles = rdtsc() - start;
        if counts >= PIT_COUNTS {
            return Some(cycles * PIT_HZ / u64::from(counts));
        }
    }
    None
}
