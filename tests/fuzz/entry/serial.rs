//! The serial port's saved state, and then its registers: pairs of bytes, each a register and what is written to it.

use ferry::device::bus::BusDevice;
use ferry::device::serial::SerialPort;
use ferry::device::{Device, DeviceState};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::allocation::{proportionate, within};

pub fn run(data: &[u8]) {
    let Some((&length, rest)) = data.split_first() else { return };
    let (state, writes) = rest.split_at(rest.len().min(length.into()));
    let port = SerialPort::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    let state = DeviceState { id: port.id().into(), version: 1, state: state.to_vec() };
    within(proportionate(data.len()), || drop(port.restore(&state)));
    let mut registers = port.registers();
    for pair in writes.chunks_exact(2) {
        registers.write(u64::from(pair[0]), &pair[1..]);
        registers.read(u64::from(pair[0]), &mut [0]);
        port.input(pair);
    }
    let saved = port.save().expect("a state");
    port.restore(&saved).expect("what was saved is taken");
}
