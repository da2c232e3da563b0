//! The bits of one dirty bitmap: atomic words, set by the disk's thread while others read.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bitvec::order::Lsb0;
use bitvec::slice::BitSlice;
use zerocopy::FromZeros;

use super::Granularity;

/// Words in a piece: 4 KiB.
pub(super) const PIECE_WORDS: usize = 512;

/// One bit for every granularity's worth of a disk; bit 0 of word 0 is the disk's beginning.
///
/// Relaxed order is enough throughout: whoever needs to see the bits of an acknowledged write is ordered after it by a lock or by the pause.
#[derive(Debug)]
pub(super) struct Bits {
    words: Box<[AtomicU64]>,
    granularity: Granularity,
    disk_size: u64,
}

impl Bits {
    pub(super) fn new(disk_size: u64, granularity: Granularity) -> Self {
        let words = disk_size.div_ceil(granularity.bytes()).div_ceil(64);
        // Memory that the kernel zeroes when it is touched: a large bitmap of a quiet disk takes little, and no time to make.
        let zeroed = <[AtomicU64]>::new_box_zeroed_with_elems(words as usize);
        let words = zeroed.unwrap_or_else(|_| (0..words).map(|_| AtomicU64::new(0)).collect());
        Bits { words, granularity, disk_size }
    }

    /// The same bits, to be changed on their own.
    pub(super) fn copy(&self) -> Self {
        let copy = Bits::new(self.disk_size, self.granularity);
        copy.merge(self);
        copy
    }

    /// Upper bound of the memory that such a bitmap takes in bytes, its bookkeeping and longest name included.
    pub(super) fn footprint(disk_size: u64, granularity: Granularity) -> u64 {
        (disk_size.div_ceil(granularity.bytes()) / 8).saturating_add(2048)
    }

    pub(super) fn disk_size(&self) -> u64 {
        self.disk_size
    }

    pub(super) fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// How many words there are.
    pub(super) fn words(&self) -> u64 {
        self.words.len() as u64
    }

    /// Sets the bits of every piece that the bytes at `offset` touch.
    pub(super) fn set(&self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.disk_size);
        if offset >= end {
            return;
        }
        // A power of two: this is done for every write.
        let shift = self.granularity.bytes().trailing_zeros();
        let (first, last) = (offset >> shift, (end - 1) >> shift);
        for index in first / 64..=last / 64 {
            let from = first.max(index * 64) % 64;
            let to = last.min(index * 64 + 63) % 64;
            self.or_valid(index, !0 << from & !0 >> (63 - to));
        }
    }

    /// The word at `index`; beyond the end it is empty.
    pub(super) fn word(&self, index: u64) -> u64 {
        self.words.get(index as usize).map_or(0, |word| word.load(Relaxed))
    }

    /// Sets the bits of `bits` in the word at `index`; bits beyond the disk are dropped.
    pub(super) fn or_word(&self, index: u64, bits: u64) {
        let left = self.disk_size.div_ceil(self.granularity.bytes()).saturating_sub(index.saturating_mul(64));
        let valid = if left >= 64 { !0 } else { (1 << left) - 1 };
        self.or_valid(index, bits & valid);
    }

    fn or_valid(&self, index: u64, bits: u64) {
        // A look first: what is set already, as most is after a while, stays in every processor's cache.
        if let Some(word) = self.words.get(index as usize)
            && bits & !word.load(Relaxed) != 0
        {
            word.fetch_or(bits, Relaxed);
        }
    }

    /// The words, little-endian, in pieces of [`PIECE_WORDS`] except for the last.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Vec<u8>> {
        self.words.chunks(PIECE_WORDS).map(|piece| piece.iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).collect())
    }

    /// Sets what is set in `other`, a bitmap of a disk of the same size.
    pub(super) fn merge(&self, other: &Bits) {
        for (index, source) in other.words.iter().enumerate() {
            let mut bits = source.load(Relaxed);
            match self.words.get(index).filter(|_| self.granularity == other.granularity) {
                Some(word) if bits != 0 => {
                    word.fetch_or(bits, Relaxed);
                }
                Some(_) => {}
                None => {
                    while bits != 0 {
                        let first = bits.trailing_zeros();
                        let count = (bits >> first).trailing_ones();
                        let bytes = |bit: u64| bit * other.granularity.bytes();
                        self.set(bytes(index as u64 * 64 + u64::from(first)), bytes(count.into()));
                        bits &= !(!0 >> (64 - count) << first);
                    }
                }
            }
        }
    }

    /// Bytes of the disk that are dirty. The last bit can stand for less than a granularity's worth.
    pub(super) fn dirty_bytes(&self) -> u64 {
        let granularity = self.granularity.bytes();
        let set: u64 = self.words.iter().map(|word| u64::from(word.load(Relaxed).count_ones())).sum();
        let last = (self.disk_size.saturating_sub(1)) / granularity;
        let overhang = if self.word(last / 64) >> (last % 64) & 1 == 1 { (last + 1) * granularity - self.disk_size } else { 0 };
        // A bit set between the sum and the look at the last word must not take the count below zero.
        (set * granularity).saturating_sub(overhang)
    }

    /// The first extent from the byte `offset`, which lies before `end`, and at most up to there: its length, and whether it is dirty.
    pub(super) fn extent(&self, offset: u64, end: u64) -> (u64, bool) {
        let granularity = self.granularity.bytes();
        let differing = |index: u64, dirty: bool| (if dirty { !self.word(index / 64) } else { self.word(index / 64) }) >> (index % 64);
        let first = offset / granularity;
        let dirty = differing(first, false) & 1 == 1;
        let mut index = first + 1;
        while index.saturating_mul(granularity) < end {
            match differing(index, dirty) {
                0 => index = (index / 64 + 1) * 64,
                bits => {
                    index += u64::from(bits.trailing_zeros());
                    break;
                }
            }
        }
        (index.saturating_mul(granularity).min(end) - offset, dirty)
    }

    /// The maximal dirty ranges in bytes, ascending.
    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        let words: Vec<u64> = self.words.iter().map(|word| word.load(Relaxed)).collect();
        let bits = BitSlice::<u64, Lsb0>::from_slice(&words);
        let byte = |bit: usize| (bit as u64 * self.granularity.bytes()).min(self.disk_size);
        let mut ranges = Vec::new();
        let mut from = 0;
        while let Some(start) = bits.get(from..).and_then(BitSlice::first_one).map(|bit| from + bit) {
            let length = bits.get(start..).and_then(BitSlice::first_zero).unwrap_or(bits.len() - start);
            ranges.push(byte(start)..byte(start + length));
            from = start + length;
        }
        ranges
    }
}
