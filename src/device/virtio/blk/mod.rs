//! virtio-blk (virtio 1.2, 5.2): a disk for the guest.

mod config;
mod execute;
pub mod request;

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Chain, DriverError, VirtioDevice};
use crate::block::disk::{Disk, DiskIo};
use crate::memory::ram::GuestMemory;

/// A disk as a virtio device.
pub struct VirtioBlk {
    id: String,
    disk: Arc<Disk>,
    features: u64,
    config: [u8; config::SIZE],
}

impl VirtioBlk {
    /// The device for `disk`.
    pub fn new(disk: Arc<Disk>) -> Self {
        let readonly = disk.config().readonly;
        VirtioBlk {
            id: format!("virtio-blk:{}", disk.config().id),
            features: config::features(readonly),
            config: config::space(disk.size(), disk.block_size(), readonly),
            disk,
        }
    }

    /// The disk behind the device.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }
}

impl VirtioDevice for VirtioBlk {
    type Backend = DiskIo;

    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn open_backend(&self) -> Result<DiskIo, String> {
        self.disk.io().map_err(|error| error.to_string())
    }

    fn process<'m>(&self, io: &DiskIo, features: u64, memory: &'m GuestMemory, chain: Chain<'m>) -> Result<u32, DriverError> {
        let request = request::Request::parse(memory, chain)?;
        execute::Executor { disk: &self.disk, io, features }.execute(memory, request)
    }
}
