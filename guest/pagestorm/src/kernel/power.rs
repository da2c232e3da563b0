//! The end.

use super::port::{out8, out16};

/// What isa-debug-exit is told: QEMU exits with twice this plus one.
#[derive(Clone, Copy)]
pub enum Outcome {
    /// All was well: QEMU exits with 33.
    Good = 0x10,
    /// A verdict was bad or nothing could be done: QEMU exits with 35.
    Bad = 0x11,
}

/// Switches the machine off, or stops if there is no known way to.
pub fn off(outcome: Outcome) -> ! {
    out8(0xf4, outcome as u8);
    // Hardware-reduced ACPI's SLEEP_CONTROL_REG as Ferry has it: SLP_EN with SLP_TYP 5.
    out8(0x600, 0x34);
    // The same register of QEMU's microvm.
    // SAFETY: mapped, and no RAM.
    unsafe { (0xfea0_0200 as *mut u8).write_volatile(0x34) };
    // PM1a_CNT of QEMU's pc and q35: SLP_EN with SLP_TYP 0.
    out16(0x604, 0x2000);
    stop()
}

/// Keeps a vCPU from doing anything.
pub fn stop() -> ! {
    super::lapic::mask_timer();
    loop {
        super::boot::halt_until_interrupt();
    }
}
