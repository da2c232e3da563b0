//! Virtio devices over the MMIO transport (virtio 1.2).
//!
//! A vCPU reaches the transport's registers ([`mmio`]); one thread for each device works on its queue (`queue_worker`) and asks the device what to
//! do with each descriptor chain. The thread touches guest memory and does I/O with no lock held: in postcopy a guest page can be missing, and
//! then the thread waits for it while the vCPUs go on.

pub mod blk;
mod interrupt;
pub mod mmio;
mod queue_worker;
mod state;
#[cfg(test)]
mod test_driver;

use thiserror::Error;
use virtio_queue::DescriptorChain;

use crate::memory::ram::GuestMemory;

/// Largest queue that a driver may set up, in descriptors.
pub const QUEUE_SIZE: u16 = 256;

/// A descriptor chain in guest memory.
pub type Chain<'m> = DescriptorChain<&'m GuestMemory>;

/// The driver broke the rules of the queue in a way that no status byte can tell it; the device asks to be reset (`DEVICE_NEEDS_RESET`).
#[derive(Debug, Error)]
pub enum DriverError {
    /// The rings themselves are wrong.
    #[error("virtqueue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// The chain has a loop, ends outside its table, or is longer than the queue.
    #[error("a descriptor chain is broken or longer than {QUEUE_SIZE} descriptors")]
    Chain,
    /// There is no byte in guest RAM to put the request's status in.
    #[error("a descriptor chain has no place for its status")]
    Status,
}

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processed {
    /// It is done, and this many bytes were written to it.
    Done(u32),
    /// It cannot be done now. It goes back to the queue, and the device does nothing until it was paused and resumed.
    Held,
}

/// What stands behind a transport: a device with one queue.
pub trait VirtioDevice: Send + Sync + 'static {
    /// What the device must hold to do its work. The transport opens it at resume and drops it at pause.
    type Backend: Send + 'static;

    /// The device's identity in saved state, for example `virtio-blk:root`.
    fn id(&self) -> &str;

    /// Device type (virtio 1.2, 5).
    fn device_type(&self) -> u32;

    /// Feature bits offered, those of the queue and `VIRTIO_F_VERSION_1` included.
    fn features(&self) -> u64;

    /// The device's configuration space; it never changes.
    fn config(&self) -> &[u8];

    /// Opens what the work needs, or says why it may not be done here.
    fn open_backend(&self) -> Result<Self::Backend, String>;

    /// Processes the chain. `features` are those negotiated.
    fn process<'m>(
        &self,
        backend: &Self::Backend,
        features: u64,
        memory: &'m GuestMemory,
        chain: Chain<'m>,
    ) -> Result<Processed, DriverError>;
}
