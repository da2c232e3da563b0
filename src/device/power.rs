//! Ports by which the guest ends itself: ACPI's hardware-reduced sleep and reset registers, and the keyboard controller's reset line.

use super::bus::BusDevice;
use crate::vm::events::{EventSink, VmEvent};
use crate::vm::layout::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_TYPE_S5};

/// SLEEP_CONTROL_REG (ACPI 6.5, table 4.20): sleep enable, and where the sleep type is.
const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 7;

/// The registers at SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT and RESET_PORT.
pub struct AcpiPower(pub EventSink);

impl BusDevice for AcpiPower {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        // No wake event is ever pending.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        const RESET: u64 = (RESET_PORT - SLEEP_CONTROL_PORT) as u64;
        for (register, value) in (offset..).zip(data) {
            match register {
                0 if value & SLP_EN != 0 && value >> SLP_TYP_SHIFT & SLP_TYP_MASK == SLEEP_TYPE_S5 => self.0.send(VmEvent::PowerOff),
                RESET if *value == RESET_VALUE => self.0.send(VmEvent::Reset),
                _ => {}
            }
        }
    }
}

/// A keyboard controller without a keyboard, one instance for each of its two ports.
pub enum I8042 {
    /// Data port.
    Data,
    /// Status and command port.
    Command(EventSink),
}

impl BusDevice for I8042 {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        // Nothing to read and ready for commands, so that a guest which waits for that goes on.
        data.fill(0);
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        const PULSE_RESET: u8 = 0xfe;
        if let (I8042::Command(events), [PULSE_RESET]) = (self, data) {
            events.send(VmEvent::Reset);
        }
    }
}
