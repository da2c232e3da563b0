//! A whole virtio-blk device: saved state, as many bytes as the first one says, then accesses to its registers and to the guest memory that it works
//! on. At the end its state must be one that another device takes.

use ferry::device::virtio::blk::VirtioBlk;
use ferry::device::virtio::mmio::VirtioMmio;
use ferry::device::{Device, DeviceState};
use ferry::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::allocation::{proportionate, within};
use super::virtio_blk::disk;

const VERSION: u16 = 1;

pub fn run(data: &[u8]) {
    let Some((&choice, mut rest)) = data.split_first() else { return };
    let ram = GuestRam::allocate(2 << 20).expect("RAM");
    let device = VirtioMmio::new(ram.clone(), VirtioBlk::new(disk(), |_| {})).expect("a device");
    if choice > 0 {
        let (state, after) = rest.split_at(rest.len().min(usize::from(choice)));
        rest = after;
        let state = DeviceState { id: device.id().into(), version: VERSION, state: state.to_vec() };
        within(proportionate(data.len()), || drop(device.restore(&state)));
    }
    device.resume().expect("the lock is there");
    let bus = device.bus_device();
    // An access: register / 4, or 0x80 + length; then 4 bytes of value, or 2 of address and the bytes to put there.
    while let Some(([what, a, b], after)) = rest.split_first_chunk::<3>() {
        let mut bus = bus.lock().expect("no panic before");
        if *what < 0x80 {
            let Some((value, after)) = after.split_first_chunk::<2>() else { break };
            bus.read(u64::from(*what) * 4, &mut [0; 4]);
            bus.write(u64::from(*what) * 4, &[*a, *b, value[0], value[1]]);
            rest = after;
        } else {
            let Some((bytes, after)) = after.split_at_checked(usize::from(what & 0x7f)) else { break };
            let address = u64::from(u16::from_le_bytes([*a, *b]));
            ram.memory().write_slice(bytes, GuestAddress(address)).expect("it fits");
            rest = after;
        }
    }
    device.pause().expect("paused");
    let saved = device.save().expect("a state");
    let other = VirtioMmio::new(ram, VirtioBlk::new(disk(), |_| {})).expect("a device");
    other.restore(&saved).expect("what was saved is taken");
    assert_eq!(other.save().expect("a state"), saved);
}
