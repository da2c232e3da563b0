//! Disks: images and their locks, the dirty bitmaps that record what the guest changed, stored in a sidecar of the image, exports for others
//! than the guest, and disks that go to and come from another host.

pub mod arriving;
pub mod block_run;
pub mod dirty_bitmap;
pub mod disk;
pub mod export_source;
pub mod image;
pub mod io_error;
pub mod nbd;
pub mod sidecar;
pub mod snapshot;

/// Bytes in a sector, the unit of virtio-blk's capacity and addresses whatever the logical block size (virtio 1.2, 5.2.4).
pub const SECTOR_SIZE: u64 = 512;
