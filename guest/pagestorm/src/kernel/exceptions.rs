//! Interrupt descriptor table, and what becomes of an exception.

use super::boot::{self, set_idt_entry};
use super::lapic;
use super::verdict::{self, Failure};

const CODE64: u64 = 0x10;
/// Present, ring 0 only, 64-bit interrupt gate.
const INTERRUPT_GATE: u64 = 0x8e;

fn gate(handler: u64) -> [u64; 2] {
    let low =
        (handler & 0xffff) | CODE64 << 16 | INTERRUPT_GATE << 40 | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// Fills the table in.
pub fn install() {
    let handlers = boot::handlers();
    for vector in 0..32 {
        set_idt_entry(vector, gate(handlers.exceptions + 16 * u64::from(vector)));
    }
    set_idt_entry(6, gate(handlers.invalid_opcode));
    set_idt_entry(lapic::TIMER_VECTOR, gate(handlers.timer));
    set_idt_entry(lapic::SPURIOUS_VECTOR, gate(handlers.spurious));
}

/// boot.s goes on here, in ring 3, after any exception but the one that waits for interrupts.
#[unsafe(no_mangle)]
extern "C" fn exception_main(vector: u64, error: u64, rip: u64, cr2: u64) -> ! {
    verdict::fail(Failure::Exception {
        vector,
        error,
        rip,
        cr2,
    })
}
