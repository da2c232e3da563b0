//! Serial port COM1. Only the boot vCPU prints, so lines never mix.

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use super::port::{in8, out8};

const COM1: u16 = 0x3f8;
const FIFO_CONTROL: u16 = COM1 + 2;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
const FIFO_SIZE: u32 = 16;
/// Reads of the line status before a byte is written regardless: a port that never gets ready is no reason to hang.
const PATIENCE: u32 = 100_000;

/// Bytes that the FIFO takes before the line status must be looked at again: each look costs a VM exit.
static ROOM: AtomicU32 = AtomicU32::new(0);

static AT_LINE_START: AtomicBool = AtomicBool::new(true);

/// Prints a line on the serial port.
macro_rules! line {
    ($($argument:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(&mut $crate::kernel::console::Console, format_args!($($argument)*));
        $crate::kernel::console::byte(b'\n');
    }};
}
pub(crate) use line;

/// Switches the FIFO on.
pub fn init() {
    out8(FIFO_CONTROL, 0x07);
}

/// Prints one byte.
pub fn byte(byte: u8) {
    let mut room = ROOM.load(Relaxed);
    if room == 0 {
        let mut patience = PATIENCE;
        while in8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 && patience > 0 {
            patience -= 1;
        }
        room = FIFO_SIZE;
    }
    ROOM.store(room - 1, Relaxed);
    AT_LINE_START.store(byte == b'\n', Relaxed);
    out8(COM1, byte);
}

/// Ends a line that has begun.
pub fn end_line() {
    if !AT_LINE_START.load(Relaxed) {
        byte(b'\n');
    }
}

/// Prints a part of a line.
pub fn text(text: fmt::Arguments<'_>) {
    let _ = fmt::Write::write_fmt(&mut Console, text);
}

/// Where [`line!`] writes to.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(byte);
        Ok(())
    }
}
