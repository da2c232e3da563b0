//! Disks: images and their locks, and the dirty bitmaps that record what the guest changed.

pub mod dirty_bitmap;
pub mod disk;
pub mod export_source;
pub mod image;
pub mod io_error;
pub mod snapshot;

/// Bytes in a sector, the unit of virtio-blk's capacity and addresses whatever the logical block size (virtio 1.2, 5.2.4).
pub const SECTOR_SIZE: u64 = 512;
