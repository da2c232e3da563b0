//! The local APIC in xAPIC mode, through its page of MMIO, which works from ring 3 (Intel SDM volume 3, chapter 11).

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::time::rdtsc;

const BASE: u64 = 0xfee0_0000;
const ID: u64 = 0x20;
const SPURIOUS: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const LVT_LINT1: u64 = 0x360;
const INITIAL_COUNT: u64 = 0x380;
const CURRENT_COUNT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;

const MASKED: u32 = 1 << 16;
const ENABLED: u32 = 1 << 8;
const DIVIDE_BY_1: u32 = 0b1011;
const DELIVERY_PENDING: u32 = 1 << 12;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;

/// Vector of the timer interrupt.
pub const TIMER_VECTOR: u8 = 0x20;
/// Vector of spurious interrupts.
pub const SPURIOUS_VECTOR: u8 = 0xff;

static BOOT_ID: AtomicU32 = AtomicU32::new(0);

fn read(register: u64) -> u32 {
    // SAFETY: mapped, and no RAM.
    unsafe { ((BASE + register) as *const u32).read_volatile() }
}

fn write(register: u64, value: u32) {
    // SAFETY: mapped, and no RAM. No interrupt that this may bring writes memory other than a ring 0 stack.
    unsafe { ((BASE + register) as *mut u32).write_volatile(value) }
}

/// This vCPU's APIC identifier.
pub fn id() -> u32 {
    read(ID) >> 24
}

/// Whether this is the vCPU that booted.
pub fn is_boot_cpu() -> bool {
    id() == BOOT_ID.load(Relaxed)
}

/// Remembers this vCPU as the one that booted.
pub fn remember_boot_cpu() {
    BOOT_ID.store(id(), Relaxed);
}

/// Switches this vCPU's local APIC on with nothing but the timer able to interrupt.
pub fn init() {
    write(LVT_LINT0, MASKED);
    write(LVT_LINT1, MASKED);
    write(SPURIOUS, ENABLED | u32::from(SPURIOUS_VECTOR));
    write(DIVIDE, DIVIDE_BY_1);
    write(LVT_TIMER, TIMER_VECTOR.into());
}

/// No more timer interrupts on this vCPU.
pub fn mask_timer() {
    write(LVT_TIMER, MASKED);
}

/// The timer, and how fast it counts.
#[derive(Clone, Copy)]
pub struct Timer {
    /// Counts per TSC cycle, times 2^32.
    counts_per_cycle: u64,
}

impl Timer {
    /// Measures the timer against the TSC for `cycles`.
    pub fn calibrate(cycles: u64) -> Self {
        write(INITIAL_COUNT, u32::MAX);
        let start = rdtsc();
        while rdtsc() - start < cycles {
            core::hint::spin_loop();
        }
        let counts = u32::MAX - read(CURRENT_COUNT);
        let cycles = rdtsc() - start;
        write(INITIAL_COUNT, 0);
        Timer {
            counts_per_cycle: ((u64::from(counts) << 32) / cycles).max(1),
        }
    }

    /// One interrupt on this vCPU, `cycles` from now.
    pub fn arm(&self, cycles: u64) {
        let counts = (u128::from(cycles) * u128::from(self.counts_per_cycle)) >> 32;
        write(INITIAL_COUNT, counts.clamp(1, u32::MAX.into()) as u32);
    }
}

fn command(apic_id: u32, command: u32) {
    write(COMMAND_HIGH, apic_id << 24);
    write(COMMAND_LOW, command);
    while read(COMMAND_LOW) & DELIVERY_PENDING != 0 {
        core::hint::spin_loop();
    }
}

/// INIT: resets a vCPU and makes it wait for [`startup`].
pub fn init_ipi(apic_id: u32) {
    command(apic_id, INIT);
}

/// STARTUP: a vCPU that waits starts in real mode at `page` (below 1 MiB).
pub fn startup_ipi(apic_id: u32, page: u32) {
    command(apic_id, STARTUP | page >> 12);
}
