//! A set of pages, kept as words because harvesting and scanning it is on every hot path.

use std::ops::Range;

use super::{PageNumber, PageRun};

/// A set of the pages 0..`pages`, one bit each.
#[derive(Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    /// A bit for each word that is not zero: around the switch sets hold few pages of many, and nobody looks at the words between.
    summary: Vec<u64>,
    pages: u64,
    len: u64,
}

impl PageSet {
    /// The empty set over `pages` pages.
    pub fn empty(pages: u64) -> Self {
        let words = pages.div_ceil(64) as usize;
        PageSet { words: vec![0; words], summary: vec![0; words.div_ceil(64)], pages, len: 0 }
    }

    /// The set of all of `pages` pages.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::empty(pages);
        set.insert(PageRun::new(0, pages));
        set
    }

    /// How many pages there are to choose from.
    pub fn universe(&self) -> u64 {
        self.pages
    }

    /// How many pages are in the set.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `page` is in the set; a page outside the universe is not.
    pub fn contains(&self, page: PageNumber) -> bool {
        self.words.get((page.0 / 64) as usize).is_some_and(|word| word >> (page.0 % 64) & 1 == 1)
    }

    /// Adds the pages of `run` that lie in the universe; returns how many were new.
    pub fn insert(&mut self, run: PageRun) -> u64 {
        let before = self.len;
        self.for_each_word(run, PageSet::insert_word);
        self.len - before
    }

    /// Takes the pages of `run` out; returns how many were in the set.
    pub fn remove(&mut self, run: PageRun) -> u64 {
        let before = self.len;
        self.for_each_word(run, PageSet::remove_word);
        before - self.len
    }

    /// Adds the pages whose bits are set in `bits`, bit 0 of which is page `64 * index`. Bits beyond the universe are dropped.
    pub fn insert_word(&mut self, index: usize, bits: u64) {
        let bits = bits & self.valid_bits(index);
        let (Some(word), Some(summary)) = (self.words.get_mut(index), self.summary.get_mut(index / 64)) else { return };
        self.len += u64::from((bits & !*word).count_ones());
        *word |= bits;
        *summary |= u64::from(*word != 0) << (index % 64);
    }

    /// Takes out the pages whose bits are set in `bits`, bit 0 of which is page `64 * index`.
    pub fn remove_word(&mut self, index: usize, bits: u64) {
        let (Some(word), Some(summary)) = (self.words.get_mut(index), self.summary.get_mut(index / 64)) else { return };
        self.len -= u64::from((bits & *word).count_ones());
        *word &= !bits;
        *summary &= !(u64::from(*word == 0) << (index % 64));
    }

    /// The words of the set, bit 0 of word 0 being page 0.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds every page of `other`.
    pub fn union(&mut self, other: &PageSet) {
        other.occupied().for_each(|(index, bits)| self.insert_word(index, bits));
    }

    /// Takes every page of `other` out.
    pub fn subtract(&mut self, other: &PageSet) {
        other.occupied().for_each(|(index, bits)| self.remove_word(index, bits));
    }

    /// The words that are not zero, and their indices.
    fn occupied(&self) -> impl Iterator<Item = (usize, u64)> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let index = self.next_occupied(next..self.words.len())?;
            next = index + 1;
            Some((index, *self.words.get(index)?))
        })
    }

    /// The first word of `range` that is not zero.
    fn next_occupied(&self, range: Range<usize>) -> Option<usize> {
        next_bit(&self.summary, range.start as u64..range.end as u64, 0).map(|index| index as usize)
    }

    /// The first run of the set at or after page `from`, at most `max` pages long.
    pub fn next_run(&self, from: u64, max: u64) -> Option<PageRun> {
        let first = self.next_member(from, self.pages)?;
        Some(PageRun::new(first, self.end_of_run(first, first.saturating_add(max).min(self.pages)) - first))
    }

    /// The maximal runs of the set in ascending order.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_within(PageRun::new(0, self.pages))
    }

    /// The runs of the set that lie in `range`, cut at its borders, in ascending order.
    pub fn runs_within(&self, range: PageRun) -> Runs<'_> {
        Runs { set: self, from: range.first.0, end: range.end() }
    }

    /// The first member from page `from` on and below `end`, which is in the universe.
    fn next_member(&self, from: u64, end: u64) -> Option<u64> {
        let first = self.next_occupied((from / 64) as usize..end.div_ceil(64) as usize)?;
        let here = next_bit(&self.words, from.max(first as u64 * 64)..end.min(first as u64 * 64 + 64), 0);
        here.or_else(|| {
            let second = self.next_occupied(first + 1..end.div_ceil(64) as usize)? as u64 * 64;
            next_bit(&self.words, second..end.min(second + 64), 0)
        })
    }

    /// The first page from member `first` on that is none, `end` at the latest.
    fn end_of_run(&self, first: u64, end: u64) -> u64 {
        next_bit(&self.words, first..end, !0).unwrap_or(end)
    }

    fn valid_bits(&self, index: usize) -> u64 {
        let left = self.pages.saturating_sub(index as u64 * 64);
        if left >= 64 { !0 } else { (1 << left) - 1 }
    }

    fn for_each_word(&mut self, run: PageRun, mut change: impl FnMut(&mut Self, usize, u64)) {
        let end = run.end().min(self.pages);
        let mut page = run.first.0;
        while page < end {
            let (index, bit) = ((page / 64) as usize, page % 64);
            let count = (64 - bit).min(end - page);
            let mask = if count == 64 { !0 } else { ((1 << count) - 1) << bit };
            change(self, index, mask);
            page += count;
        }
    }
}

impl Clone for PageSet {
    fn clone(&self) -> Self {
        let mut copy = PageSet { len: self.len, ..PageSet::empty(self.pages) };
        copy.summary.copy_from_slice(&self.summary);
        for ((to, from), summary) in copy.words.chunks_mut(64).zip(self.words.chunks(64)).zip(&self.summary) {
            if *summary != 0 {
                to.copy_from_slice(from);
            }
        }
        copy
    }
}

/// The number of the first bit in `range` that differs from that of `flip` (all zeros: the next that is set; all ones: the next that is not).
fn next_bit(words: &[u64], range: Range<u64>, flip: u64) -> Option<u64> {
    if range.is_empty() {
        return None;
    }
    let start = (range.start / 64) as usize;
    let words = words.get(start..range.end.div_ceil(64) as usize)?;
    let mut skip = !0 << (range.start % 64);
    for (index, &word) in (start..).zip(words) {
        let bits = (word ^ flip) & skip;
        if bits != 0 {
            let found = index as u64 * 64 + u64::from(bits.trailing_zeros());
            return (found < range.end).then_some(found);
        }
        skip = !0;
    }
    None
}

/// Iterator over runs of a [`PageSet`].
pub struct Runs<'a> {
    set: &'a PageSet,
    from: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let end = self.end.min(self.set.pages);
        let first = self.set.next_member(self.from, end)?;
        self.from = self.set.end_of_run(first, end);
        Some(PageRun::new(first, self.from - first))
    }
}

#[cfg(test)]
mod tests;
