//! What the device offers: feature bits and configuration space.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::super::QUEUE_SIZE;
use crate::block::SECTOR_SIZE;

/// Size of `struct virtio_blk_config` up to the fields of write-zeroes, in bytes (virtio 1.2, 5.2.4).
pub(super) const SIZE: usize = 60;

/// Data segments in a request; header and status take a descriptor each.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Ranges in one discard.
pub(super) const MAX_DISCARD_RANGES: u32 = 32;
/// Ranges in one write-zeroes.
pub(super) const MAX_ZEROES_RANGES: u32 = 1;
/// Sectors in one range of a discard: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Sectors in one range of a write-zeroes: 64 MiB, because a pause waits for it and it may have to be written out.
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 17;
/// Discards that do not cover whole pieces of this size free nothing on most file systems.
const DISCARD_ALIGNMENT: u64 = 4096;

/// Features offered for a disk.
pub(super) fn features(readonly: bool) -> u64 {
    let always = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_SEG_MAX,
    ];
    let rest: &[u32] = if readonly { &[VIRTIO_BLK_F_RO] } else { &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES] };
    always.iter().chain(rest).fold(0, |features, bit| features | 1 << bit)
}

/// The configuration space of a disk of `size` bytes.
pub(super) fn space(size: u64, block_size: u32, readonly: bool) -> [u8; SIZE] {
    let mut space = [0; SIZE];
    let mut put = |offset: usize, bytes: &[u8]| {
        for (target, byte) in space.iter_mut().skip(offset).zip(bytes) {
            *target = *byte;
        }
    };
    // Offsets of the fields: capacity, seg_max, blk_size, num_queues.
    put(0, &(size / SECTOR_SIZE).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &block_size.to_le_bytes());
    put(34, &1u16.to_le_bytes());
    if !readonly {
        // max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors, max_write_zeroes_seg,
        // write_zeroes_may_unmap.
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_RANGES.to_le_bytes());
        put(44, &((DISCARD_ALIGNMENT / SECTOR_SIZE) as u32).to_le_bytes());
        put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &MAX_ZEROES_RANGES.to_le_bytes());
        put(56, &[1]);
    }
    space
}
