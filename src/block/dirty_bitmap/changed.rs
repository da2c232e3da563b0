//! Which blocks of a disk change while storage copy sends them: bits like a dirty bitmap's, without a name, that nobody else sees.

use std::sync::Arc;

use super::bits::Bits;
use super::{DirtyBitmaps, Granularity};
use crate::block::block_run::COPY_BLOCK;

/// Records, until it is dropped, the blocks of [`COPY_BLOCK`] bytes that change.
#[derive(Debug)]
pub struct ChangeTracking {
    bitmaps: Arc<DirtyBitmaps>,
    bits: Arc<Bits>,
}

/// The blocks that changed between two moments.
#[derive(Debug)]
pub struct ChangedBlocks(Arc<Bits>);

impl ChangedBlocks {
    /// One bit for each block; bit 0 of the first word is the disk's first block. Bits beyond the disk are not set.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        (0..self.0.words()).map(|index| self.0.word(index))
    }
}

impl DirtyBitmaps {
    /// Records from now on which blocks change.
    pub fn track_changes(self: &Arc<Self>) -> ChangeTracking {
        let bits = self.no_changes();
        self.write().tracked.push(bits.clone());
        ChangeTracking { bitmaps: self.clone(), bits }
    }

    fn no_changes(&self) -> Arc<Bits> {
        Arc::new(Bits::new(self.disk_size, Granularity(COPY_BLOCK as u32)))
    }
}

impl ChangeTracking {
    /// What has changed since the last time, or since the beginning. Every change falls, with its mark, before or after this as a whole: what is
    /// read afterwards has all that is marked in the result.
    pub fn take(&mut self) -> ChangedBlocks {
        let next = self.bitmaps.no_changes();
        // All that the guest's requests wait for.
        if let Some(bits) = self.bitmaps.write().tracked.iter_mut().find(|bits| Arc::ptr_eq(bits, &self.bits)) {
            bits.clone_from(&next);
        }
        ChangedBlocks(std::mem::replace(&mut self.bits, next))
    }
}

impl Drop for ChangeTracking {
    fn drop(&mut self) {
        // The bits themselves are freed without the lock, after this.
        self.bitmaps.write().tracked.retain(|bits| !Arc::ptr_eq(bits, &self.bits));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(changed: &ChangedBlocks) -> Vec<u64> {
        changed.words().collect()
    }

    #[test]
    fn changes_are_taken_once_and_nobody_sees_them_but_who_tracks() {
        // The last block has 512 bytes.
        let bitmaps = DirtyBitmaps::new(70 * COPY_BLOCK + 512);
        bitmaps.mark(0, COPY_BLOCK);
        let mut tracking = bitmaps.track_changes();
        assert!(bitmaps.info().is_empty() && bitmaps.hold().remove("").is_err());
        assert_eq!(words(&tracking.take()), [0, 0]);
        bitmaps.mark(4095, 2);
        bitmaps.mark(70 * COPY_BLOCK, u64::MAX);
        let mut other = bitmaps.track_changes();
        bitmaps.change(|held| held.add("a", Granularity::default(), true, false)).unwrap();
        bitmaps.mark(3 * COPY_BLOCK, 1);
        assert_eq!(words(&tracking.take()), [0b1011, 1 << 6]);
        assert_eq!(words(&tracking.take()), [0, 0]);
        assert_eq!(words(&other.take()), [0b1000, 0]);
        drop(tracking);
        bitmaps.mark(0, 1);
        assert_eq!(words(&other.take()), [1, 0]);
        drop(other);
        assert!(bitmaps.read().tracked.is_empty());
    }

    #[test]
    fn no_change_is_lost_between_two_takes() {
        let blocks = 64 * 64;
        let bitmaps = DirtyBitmaps::new(blocks * COPY_BLOCK);
        let mut tracking = bitmaps.track_changes();
        let writer = std::thread::spawn({
            let bitmaps = bitmaps.clone();
            move || (0..blocks).for_each(|block| bitmaps.mark(block * COPY_BLOCK, 1))
        });
        let mut taken = 0;
        while !writer.is_finished() {
            taken += words(&tracking.take()).iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        }
        writer.join().unwrap();
        taken += words(&tracking.take()).iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        assert_eq!(taken, blocks);
    }
}
