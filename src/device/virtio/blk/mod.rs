//! virtio-blk (virtio 1.2, 5.2): a disk for the guest.

mod config;
mod errors;
mod execute;
pub mod request;

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Chain, DriverError, Processed, VirtioDevice};
use crate::block::disk::{Disk, DiskIo};
use crate::block::io_error::{BlockIoError, IoStatus};
use crate::memory::ram::GuestMemory;

/// A disk as a virtio device.
pub struct VirtioBlk {
    id: String,
    disk: Arc<Disk>,
    features: u64,
    config: [u8; config::SIZE],
    errors: errors::Errors,
}

impl VirtioBlk {
    /// The device for `disk`. `on_error` hears of requests that the image fails, on the device's thread: of each that is to stop the guest,
    /// and of not more than one in a second that is reported to it, because a guest can make them come as fast as it likes.
    pub fn new(disk: Arc<Disk>, on_error: impl Fn(BlockIoError) + Send + Sync + 'static) -> Self {
        let readonly = disk.config().readonly;
        VirtioBlk {
            id: format!("virtio-blk:{}", disk.config().id),
            features: config::features(readonly),
            config: config::space(disk.size(), disk.block_size(), readonly),
            errors: errors::Errors::new(on_error),
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
        let io = self.disk.io().map_err(|error| error.to_string())?;
        self.disk.set_io_status(IoStatus::Ok);
        Ok(io)
    }

    fn process<'m>(&self, io: &DiskIo, features: u64, memory: &'m GuestMemory, chain: Chain<'m>) -> Result<Processed, DriverError> {
        let request = request::Request::parse(memory, chain)?;
        execute::Executor { disk: &self.disk, io, features, errors: &self.errors }.execute(memory, request)
    }
}
