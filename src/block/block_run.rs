//! Blocks of a disk as storage copy counts them.

use std::ops::Range;

use crate::memory::PAGE_SIZE;

/// Bytes in a block: the unit in which storage copy tracks changes, sends and waits. The disk's last block may be shorter.
pub const COPY_BLOCK: u64 = 4096;

// What is sent as pages of RAM are sent.
const _: () = assert!(COPY_BLOCK == PAGE_SIZE as u64);

/// Neighbouring blocks of [`COPY_BLOCK`] bytes of one disk, counted from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRun {
    /// The first block.
    pub first: u64,
    /// How many blocks follow one another, the first included; none in an empty run.
    pub count: u64,
}

impl BlockRun {
    /// A run of `count` blocks from block `first` on.
    pub const fn new(first: u64, count: u64) -> Self {
        BlockRun { first, count }
    }

    /// The blocks from `first` up to and without `end`; none if there is nothing between.
    pub const fn between(first: u64, end: u64) -> Self {
        BlockRun { first, count: end.saturating_sub(first) }
    }

    /// Every block of a disk of `disk_size` bytes.
    pub const fn all(disk_size: u64) -> Self {
        BlockRun { first: 0, count: disk_size.div_ceil(COPY_BLOCK) }
    }

    /// The blocks that have at least one of `bytes`.
    pub const fn touched_by(bytes: &Range<u64>) -> Self {
        if bytes.start >= bytes.end {
            return BlockRun { first: bytes.start / COPY_BLOCK, count: 0 };
        }
        Self::between(bytes.start / COPY_BLOCK, bytes.end.div_ceil(COPY_BLOCK))
    }

    /// The blocks all of whose bytes are in `bytes`, on a disk of `disk_size` bytes, where the last block may end.
    pub const fn covered_by(bytes: &Range<u64>, disk_size: u64) -> Self {
        let end = if bytes.end >= disk_size { disk_size.div_ceil(COPY_BLOCK) } else { bytes.end / COPY_BLOCK };
        Self::between(bytes.start.div_ceil(COPY_BLOCK), end)
    }

    /// The block after the last one; saturates, so that runs from outside can be compared before they are checked.
    pub const fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// The run's bytes on a disk of `disk_size` bytes, cut off at its end.
    pub fn bytes(self, disk_size: u64) -> Range<u64> {
        let byte = |block: u64| block.saturating_mul(COPY_BLOCK).min(disk_size);
        byte(self.first)..byte(self.end())
    }

    /// Whether the runs have a block in common.
    pub const fn overlaps(self, other: Self) -> bool {
        self.first < other.end() && other.first < self.end() && self.count > 0 && other.count > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_block_is_covered_up_to_the_disk_s_end() {
        let size = 2 * COPY_BLOCK + 512;
        for (bytes, touched, covered) in [
            (0..4096, (0, 1), (0, 1)),
            (1..4096, (0, 1), (1, 0)),
            (4096..size, (1, 2), (1, 2)),
            (8192..size, (2, 1), (2, 1)),
            (8704 - 1..size, (2, 1), (3, 0)),
            (512..8704 - 1, (0, 3), (1, 1)),
            (512..8192, (0, 2), (1, 1)),
            (512..512, (0, 0), (1, 0)),
        ] {
            assert_eq!(BlockRun::touched_by(&bytes), BlockRun::new(touched.0, touched.1), "{bytes:?}");
            assert_eq!(BlockRun::covered_by(&bytes, size), BlockRun::new(covered.0, covered.1), "{bytes:?}");
        }
        assert_eq!(BlockRun::all(size).bytes(size), 0..size);
        assert!(!BlockRun::new(1, 0).overlaps(BlockRun::new(0, 3)));
        assert!(BlockRun::new(1, 2).overlaps(BlockRun::new(2, 1)) && !BlockRun::new(1, 1).overlaps(BlockRun::new(2, 1)));
    }
}
