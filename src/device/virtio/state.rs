//! Saved state of a virtio-mmio device with one queue.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER, VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED as FAILED, VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};

use super::QUEUE_SIZE;
use super::interrupt::INTERRUPT_BITS;
use super::queue_worker::ActiveQueue;
use crate::memory::ram::GuestMemory;

/// Version of [`SavedState`]'s layout.
pub(super) const VERSION: u16 = 1;

/// The queue as the driver described it, unchecked until it is activated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    pub(super) size: u32,
    pub(super) ready: bool,
    pub(super) desc_table: u64,
    pub(super) avail_ring: u64,
    pub(super) used_ring: u64,
}

/// The registers that a driver writes, except what the interrupt keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    /// Device status without `DEVICE_NEEDS_RESET`.
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) queue: QueueRegisters,
}

/// Everything that moves with the guest.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedState {
    pub(super) registers: Registers,
    pub(super) interrupt_status: u32,
    pub(super) needs_reset: bool,
    /// `next_avail` and `next_used` of the queue, if it is active.
    pub(super) indices: Option<(u16, u16)>,
    /// The device's configuration space, which the driver has read.
    pub(super) config: Vec<u8>,
}

impl Registers {
    /// The queue ready to be worked on, at the given `next_avail` and `next_used`, or nothing where the driver described no usable queue.
    /// Looks at no guest memory.
    pub(super) fn activate(&self, memory: &GuestMemory, (next_avail, next_used): (u16, u16)) -> Option<ActiveQueue> {
        let state = QueueState {
            max_size: QUEUE_SIZE,
            next_avail,
            next_used,
            event_idx_enabled: self.driver_features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1,
            size: u16::try_from(self.queue.size).ok()?,
            ready: self.queue.ready,
            desc_table: self.queue.desc_table,
            avail_ring: self.queue.avail_ring,
            used_ring: self.queue.used_ring,
        };
        let queue = Queue::try_from(state).ok()?;
        queue.is_valid(memory).then_some(ActiveQueue { queue, features: self.driver_features })
    }

    /// Whether the driver wants the queue worked on.
    pub(super) fn is_active(&self) -> bool {
        self.status & DRIVER_OK != 0 && self.queue.ready
    }

    /// Applies a write of `written`, not zero, to the status register. Bits are only ever added, in the order of virtio 1.2, 3.1.1, and
    /// `FEATURES_OK` only if the driver chose among `offered` features and took `VIRTIO_F_VERSION_1`.
    pub(super) fn add_status(&mut self, written: u32, offered: u64) {
        self.status |= written & FAILED;
        let features_ok = self.driver_features & !offered == 0 && self.driver_features >> VIRTIO_F_VERSION_1 & 1 == 1;
        for (bit, before, allowed) in
            [(ACKNOWLEDGE, 0, true), (DRIVER, ACKNOWLEDGE, true), (FEATURES_OK, DRIVER, features_ok), (DRIVER_OK, FEATURES_OK, true)]
        {
            if written & bit != 0 && self.status & before == before && allowed {
                self.status |= bit;
            }
        }
    }

    /// Whether a driver could have brought the registers here.
    fn is_reachable(&self, offered: u64) -> bool {
        let mut other = Registers { status: 0, ..self.clone() };
        other.add_status(self.status, offered);
        other.status == self.status
    }
}

impl SavedState {
    /// Decodes and checks state from outside, for a device that offers `offered` features and has `config`. Also gives the active queue.
    pub(super) fn decode(bytes: &[u8], offered: u64, config: &[u8], memory: &GuestMemory) -> Result<(Self, Option<ActiveQueue>), String> {
        let (state, rest): (SavedState, _) = postcard::take_from_bytes(bytes).map_err(|error| error.to_string())?;
        let registers = &state.registers;
        if !rest.is_empty() {
            return Err(format!("{} bytes too many", rest.len()));
        }
        if state.config != config {
            return Err("the device is configured otherwise here than at the source (for a disk: size, block size or readonly)".to_owned());
        }
        if !registers.is_reachable(offered) {
            let (status, features) = (registers.status, registers.driver_features);
            return Err(format!("status {status:#x} with features {features:#x} of {offered:#x} offered"));
        }
        if state.interrupt_status & !INTERRUPT_BITS != 0 {
            return Err(format!("interrupt status {:#x}", state.interrupt_status));
        }
        let queue = match state.indices {
            None => None,
            Some(_) if !registers.is_active() || state.needs_reset => return Err("a queue is active that cannot be".to_owned()),
            Some(indices) => Some(registers.activate(memory, indices).ok_or_else(|| format!("queue {:x?}", registers.queue))?),
        };
        if queue.is_none() && registers.is_active() && !state.needs_reset {
            return Err("an active queue has no indices".to_owned());
        }
        Ok((state, queue))
    }
}
