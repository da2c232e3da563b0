//! Which pages of guest RAM this process has written for the guest, its disks' reads above all: KVM does not see these. vm-memory marks them.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use zerocopy::FromZeros;

use super::PAGE_SIZE;

const BITS: usize = u64::BITS as usize;

/// A bitmap of a region's pages, in two levels so that taking it costs as much as there is to take.
#[derive(Debug)]
pub struct DeviceWrites {
    /// A bit for each page.
    words: Box<[AtomicU64]>,
    /// A bit for each word that has any.
    summary: Box<[AtomicU64]>,
}

impl DeviceWrites {
    /// For a region of `bytes` bytes, in which nothing was written.
    pub fn new(bytes: usize) -> Self {
        // Memory that the kernel zeroes when it is touched: of most guests hardly any is.
        let zeros = |count: usize| {
            let zeroed = <[AtomicU64]>::new_box_zeroed_with_elems(count);
            zeroed.unwrap_or_else(|_| (0..count).map(|_| AtomicU64::new(0)).collect())
        };
        let words = bytes.div_ceil(PAGE_SIZE).div_ceil(BITS);
        DeviceWrites { words: zeros(words), summary: zeros(words.div_ceil(BITS)) }
    }

    /// Calls `found` with every word that has pages marked since the last call, and its index. A mark that is made meanwhile is found now or
    /// the next time.
    pub fn take(&self, mut found: impl FnMut(usize, u64)) {
        for (first, summary) in (0..).step_by(BITS).zip(&self.summary) {
            let mut rest = if summary.load(Ordering::Relaxed) == 0 { 0 } else { summary.swap(0, Ordering::SeqCst) };
            while rest != 0 {
                let index = first + rest.trailing_zeros() as usize;
                rest &= rest - 1;
                if let Some(word) = self.words.get(index) {
                    found(index, word.swap(0, Ordering::SeqCst));
                }
            }
        }
    }
}

impl<'a> WithBitmapSlice<'a> for DeviceWrites {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DeviceWrites {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        for page in offset / PAGE_SIZE..=offset.saturating_add(len - 1) / PAGE_SIZE {
            let (Some(word), Some(summary)) = (self.words.get(page / BITS), self.summary.get(page / BITS / BITS)) else { return };
            word.fetch_or(1 << (page % BITS), Ordering::SeqCst);
            // After the page's own bit: whoever finds this one finds that one.
            summary.fetch_or(1 << (page / BITS % BITS), Ordering::SeqCst);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_SIZE;
        self.words.get(page / BITS).is_some_and(|word| word.load(Ordering::Acquire) >> (page % BITS) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn taken(writes: &DeviceWrites) -> Vec<usize> {
        let mut pages = Vec::new();
        writes.take(|index, word| pages.extend((0..BITS).filter(|bit| word >> bit & 1 == 1).map(|bit| index * BITS + bit)));
        pages
    }

    #[test]
    fn what_is_marked_is_taken_once() {
        let writes = DeviceWrites::new(6_400 * PAGE_SIZE);
        assert!(taken(&writes).is_empty());
        writes.mark_dirty(5 * PAGE_SIZE + 7, 1);
        writes.mark_dirty(64 * PAGE_SIZE - 1, 2);
        writes.slice_at(6_399 * PAGE_SIZE).mark_dirty(0, PAGE_SIZE);
        writes.mark_dirty(100 * PAGE_SIZE, 0);
        writes.mark_dirty(6_400 * PAGE_SIZE, usize::MAX);
        assert!(writes.dirty_at(64 * PAGE_SIZE) && !writes.dirty_at(65 * PAGE_SIZE));
        assert_eq!(taken(&writes), [5, 63, 64, 6_399]);
        assert!(taken(&writes).is_empty());
    }

    #[test]
    fn no_mark_is_lost_between_two_takes() {
        let (writes, over) = (DeviceWrites::new(BITS * PAGE_SIZE), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..100_000 {
                    writes.mark_dirty(round % 3 * PAGE_SIZE, 1);
                }
                over.store(true, Ordering::SeqCst);
            });
            let mut found = 0;
            while !over.load(Ordering::SeqCst) {
                found += taken(&writes).len();
            }
            found += taken(&writes).len();
            assert!(found > 0 && taken(&writes).is_empty() && (0..3).all(|page| !writes.dirty_at(page * PAGE_SIZE)));
        });
    }
}
