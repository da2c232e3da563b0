//! I/O ports, which the I/O permission bitmap opens to ring 3 up to 0x7ff.

use core::arch::asm;

/// Writes a byte.
pub fn out8(port: u16, value: u8) {
    // SAFETY: port I/O does not touch memory; on the ports used here it harms nothing.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    }
}

/// Writes a 16-bit word.
pub fn out16(port: u16, value: u16) {
    // SAFETY: as for out8.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags))
    }
}

/// Reads a byte.
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as for out8.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    }
    value
}
