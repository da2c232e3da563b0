//! The MMIO transport, version 2 (virtio 1.2, 4.2), for a device with one queue.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET};
use virtio_bindings::virtio_mmio::*;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::queue_worker::QueueWorker;
use super::state::{Registers, SavedState, VERSION};
use super::{QUEUE_SIZE, VirtioDevice};
use crate::device::bus::BusDevice;
use crate::device::{Device, DeviceError, DeviceState};
use crate::memory::GuestRam;

/// "virt" in little endian.
const MAGIC: u32 = 0x7472_6976;
/// The only version since virtio 1.0.
const TRANSPORT_VERSION: u32 = 2;
/// Ours to choose; "FRRY" in little endian.
const VENDOR: u32 = 0x5952_5246;

/// Why a device could not be set up.
#[derive(Debug, Error)]
pub enum VirtioError {
    /// No thread or event for the device.
    #[error("cannot start device {id}: {source}")]
    Start {
        /// Which device.
        id: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// KVM does not take the device's events.
    #[error("cannot connect device {id} to KVM ({what}): {source}")]
    Connect {
        /// Which device.
        id: String,
        /// `ioeventfd` or `irqfd`.
        what: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

/// A virtio device behind the MMIO transport. A new one is paused: [`Device::resume`] must come before the guest runs.
///
/// A vCPU that resets the device, or withdraws the queue, waits for the request in flight, because Linux frees its buffers right after
/// the write. No other register waits for the device's thread.
pub struct VirtioMmio<D: VirtioDevice> {
    id: String,
    registers: Mutex<Registers>,
    worker: QueueWorker<D>,
}

impl<D: VirtioDevice> VirtioMmio<D> {
    /// Starts the device's thread. The device works without KVM: [`VirtioMmio::kick_event`] goes in and [`VirtioMmio::interrupt_event`] comes out.
    pub fn new(ram: GuestRam, device: D) -> Result<Arc<Self>, VirtioError> {
        let id = device.id().to_owned();
        let worker = QueueWorker::start(device, ram).map_err(|source| VirtioError::Start { id: id.clone(), source })?;
        Ok(Arc::new(VirtioMmio { id, registers: Mutex::default(), worker }))
    }

    /// Connects the device to a virtual machine: QueueNotify at the MMIO range that begins at `address` by ioeventfd, and its interrupt to
    /// `gsi` (edge-triggered) by irqfd.
    pub fn connect(&self, vm: &VmFd, address: GuestAddress, gsi: u32) -> Result<(), VirtioError> {
        let error = |what, source| VirtioError::Connect { id: self.id.clone(), what, source };
        let notify = IoEventAddress::Mmio(address.0 + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        // The value written to QueueNotify is the index of the queue (virtio 1.2, 4.2.3.3); other values come to `write` below.
        vm.register_ioevent(self.kick_event(), &notify, 0u32).map_err(|source| error("ioeventfd", source))?;
        vm.register_irqfd(self.interrupt_event(), gsi).map_err(|source| error("irqfd", source))
    }

    /// The device as the MMIO bus takes it.
    pub fn bus_device(self: &Arc<Self>) -> Arc<Mutex<dyn BusDevice>> {
        Arc::new(Mutex::new(MmioRange(self.clone())))
    }

    /// Written when the driver notifies queue 0.
    pub fn kick_event(&self) -> &EventFd {
        self.worker.kick_event()
    }

    /// Written when the device raises its interrupt.
    pub fn interrupt_event(&self) -> &EventFd {
        self.worker.interrupt().event()
    }

    /// The device behind the transport.
    pub fn device(&self) -> &D {
        self.worker.device()
    }

    /// Back to the state after power-on, when the request in flight is done.
    pub fn reset(&self) {
        self.reset_registers(&mut self.registers());
    }

    fn reset_registers(&self, registers: &mut Registers) {
        self.worker.set_queue(None);
        *registers = Registers::default();
        // After the queue is gone, so that nothing sets them again.
        self.worker.interrupt().set(0, false);
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, reason: String) -> DeviceError {
        DeviceError::State { id: self.id.clone(), reason }
    }

    fn read_register(&self, offset: u32) -> u32 {
        let registers = self.registers();
        let selected = registers.queue_sel == 0;
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => TRANSPORT_VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device().device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match registers.device_features_sel {
                0 => self.device().features() as u32,
                1 => (self.device().features() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX if selected => u32::from(QUEUE_SIZE),
            VIRTIO_MMIO_QUEUE_READY if selected => u32::from(registers.queue.ready),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.worker.interrupt().status(),
            VIRTIO_MMIO_STATUS => registers.status | if self.worker.interrupt().needs_reset() { NEEDS_RESET } else { 0 },
            // All ones: no such shared memory region (virtio 1.2, 4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH | VIRTIO_MMIO_SHM_BASE_LOW | VIRTIO_MMIO_SHM_BASE_HIGH => !0,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_QUEUE_NOTIFY if value == 0 => return self.worker.kick(),
            VIRTIO_MMIO_INTERRUPT_ACK => return self.worker.interrupt().acknowledge(value),
            _ => {}
        }
        let registers = &mut *self.registers();
        match offset {
            VIRTIO_MMIO_STATUS if value == 0 => self.reset_registers(registers),
            VIRTIO_MMIO_STATUS => {
                let before = registers.is_active();
                registers.add_status(value, self.device().features());
                self.activate(registers, before);
            }
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            // Once both sides agreed the features stand until the next reset.
            VIRTIO_MMIO_DRIVER_FEATURES if registers.status & FEATURES_OK == 0 => match registers.driver_features_sel {
                0 => set_low(&mut registers.driver_features, value),
                1 => set_high(&mut registers.driver_features, value),
                _ => {}
            },
            VIRTIO_MMIO_QUEUE_SEL => registers.queue_sel = value,
            VIRTIO_MMIO_QUEUE_READY if registers.queue_sel == 0 => {
                let before = registers.is_active();
                registers.queue.ready = value & 1 == 1;
                self.activate(registers, before);
            }
            _ if registers.queue_sel == 0 && !registers.queue.ready => write_queue_register(registers, offset, value),
            _ => {}
        }
    }

    /// Gives the queue to the device's thread, or takes it away, when it became active or ceased to be.
    fn activate(&self, registers: &Registers, before: bool) {
        match (before, registers.is_active()) {
            (false, true) if !self.worker.interrupt().needs_reset() => {
                let queue = registers.activate(self.worker.ram().memory(), (0, 0));
                if queue.is_none() {
                    self.worker.interrupt().set_needs_reset();
                }
                self.worker.set_queue(queue);
            }
            (true, false) => self.worker.set_queue(None),
            _ => {}
        }
    }
}

/// QueueNum and the addresses of the queue's parts, while the queue is not ready.
fn write_queue_register(registers: &mut Registers, offset: u32, value: u32) {
    let queue = &mut registers.queue;
    match offset {
        VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
        VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.desc_table, value),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.desc_table, value),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail_ring, value),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail_ring, value),
        VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used_ring, value),
        VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used_ring, value),
        _ => {}
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !0xffff_ffff | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & 0xffff_ffff | u64::from(value) << 32;
}

/// The device's range on the MMIO bus.
struct MmioRange<D: VirtioDevice>(Arc<VirtioMmio<D>>);

impl<D: VirtioDevice> BusDevice for MmioRange<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            Some(start) => {
                let config = usize::try_from(start).ok().and_then(|start| self.0.device().config().get(start..)).unwrap_or_default();
                for (target, source) in data.iter_mut().zip(config) {
                    *target = *source;
                }
            }
            // Registers are 32 bits wide and aligned (virtio 1.2, 4.2.2.2); anything else reads as 0.
            None if offset.is_multiple_of(4) => {
                if let Ok(register) = <&mut [u8; 4]>::try_from(data) {
                    *register = self.0.read_register(offset as u32).to_le_bytes();
                }
            }
            None => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // The configuration space has nothing to write.
        if let Ok(value) = <[u8; 4]>::try_from(data)
            && offset < u64::from(VIRTIO_MMIO_CONFIG)
            && offset.is_multiple_of(4)
        {
            self.0.write_register(offset as u32, u32::from_le_bytes(value));
        }
    }
}

impl<D: VirtioDevice> Device for VirtioMmio<D> {
    fn id(&self) -> &str {
        &self.id
    }

    fn pause(&self) -> Result<(), DeviceError> {
        self.worker.pause().map_err(|reason| DeviceError::Failed { id: self.id.clone(), reason })
    }

    fn resume(&self) -> Result<(), DeviceError> {
        // Before the thread works, so that an interrupt it raises now is not raised twice.
        self.worker.interrupt().repeat();
        self.worker.resume().map_err(|reason| DeviceError::Failed { id: self.id.clone(), reason })
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        let state = SavedState {
            registers: self.registers().clone(),
            interrupt_status: self.worker.interrupt().status(),
            needs_reset: self.worker.interrupt().needs_reset(),
            indices: self.worker.queue_indices(),
            config: self.device().config().to_vec(),
        };
        let state = postcard::to_stdvec(&state).map_err(|error| self.error(error.to_string()))?;
        Ok(DeviceState { id: self.id.clone(), version: VERSION, state })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), DeviceError> {
        if state.id != self.id || state.version != VERSION {
            return Err(self.error(format!("it is version {} of device {}, not version {VERSION} of this", state.version, state.id)));
        }
        let (offered, config) = (self.device().features(), self.device().config());
        let decoded = SavedState::decode(&state.state, offered, config, self.worker.ram().memory());
        let (state, queue) = decoded.map_err(|reason| self.error(reason))?;
        self.worker.pause().map_err(|reason| DeviceError::Failed { id: self.id.clone(), reason })?;
        self.worker.set_queue(queue);
        *self.registers() = state.registers;
        self.worker.interrupt().set(state.interrupt_status, state.needs_reset);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
