//! What the device tells the driver unasked: interrupts, and that it needs a reset.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Every bit of InterruptStatus (virtio 1.2, 4.2.2).
pub(super) const INTERRUPT_BITS: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;

/// The InterruptStatus register and the event that raises the interrupt, used by the device's thread and the vCPUs without a lock.
pub(super) struct Interrupt {
    status: AtomicU32,
    needs_reset: AtomicBool,
    event: EventFd,
}

impl Interrupt {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Interrupt { status: AtomicU32::new(0), needs_reset: AtomicBool::new(false), event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// The event to connect to the interrupt controller (irqfd).
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Buffers were used.
    pub(super) fn used_buffer(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The device cannot go on until it is reset. The driver learns of it by a configuration change notification (virtio 1.2, 2.1.2).
    pub(super) fn set_needs_reset(&self) {
        self.needs_reset.store(true, SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(SeqCst)
    }

    /// The InterruptStatus register.
    pub(super) fn status(&self) -> u32 {
        self.status.load(SeqCst)
    }

    /// A write to InterruptACK.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, SeqCst);
    }

    /// Back to the state after a reset, or to a saved one.
    pub(super) fn set(&self, status: u32, needs_reset: bool) {
        self.status.store(status, SeqCst);
        self.needs_reset.store(needs_reset, SeqCst);
    }

    /// Raises the interrupt again if it is not acknowledged. One that was on its way when the guest was paused may not have reached the saved
    /// interrupt controller; one too many does no harm.
    pub(super) fn repeat(&self) {
        if self.status() != 0 {
            self.signal();
        }
    }

    fn raise(&self, bits: u32) {
        // The bits first: the driver reads them as soon as the interrupt arrives.
        self.status.fetch_or(bits, SeqCst);
        self.signal();
    }

    fn signal(&self) {
        // Fails only when the counter is full, and then the event is pending anyway.
        let _ = self.event.write(1);
    }
}
