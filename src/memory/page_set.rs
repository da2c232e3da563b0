//! A set of pages, kept as words because harvesting and scanning it is on every hot path.

use super::{PageNumber, PageRun};

/// A set of the pages 0..`pages`, one bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
    len: u64,
}

impl PageSet {
    /// The empty set over `pages` pages.
    pub fn empty(pages: u64) -> Self {
        PageSet { words: vec![0; pages.div_ceil(64) as usize], pages, len: 0 }
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
        self.for_each_word(run, |word, mask| *word |= mask);
        self.len - before
    }

    /// Takes the pages of `run` out; returns how many were in the set.
    pub fn remove(&mut self, run: PageRun) -> u64 {
        let before = self.len;
        self.for_each_word(run, |word, mask| *word &= !mask);
        before - self.len
    }

    /// Adds the pages whose bits are set in `bits`, bit 0 of which is page `64 * index`. Bits beyond the universe are dropped.
    pub fn insert_word(&mut self, index: usize, bits: u64) {
        let valid = self.valid_bits(index);
        if let Some(word) = self.words.get_mut(index) {
            self.len += u64::from((bits & valid & !*word).count_ones());
            *word |= bits & valid;
        }
    }

    /// Takes out the pages whose bits are set in `bits`, bit 0 of which is page `64 * index`.
    pub fn remove_word(&mut self, index: usize, bits: u64) {
        if let Some(word) = self.words.get_mut(index) {
            self.len -= u64::from((bits & *word).count_ones());
            *word &= !bits;
        }
    }

    /// The words of the set, bit 0 of word 0 being page 0.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds every page of `other`.
    pub fn union(&mut self, other: &PageSet) {
        for (index, &bits) in other.words.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            self.insert_word(index, bits);
        }
    }

    /// Takes every page of `other` out.
    pub fn subtract(&mut self, other: &PageSet) {
        for (word, &bits) in self.words.iter_mut().zip(&other.words) {
            self.len -= u64::from((*word & bits).count_ones());
            *word &= !bits;
        }
    }

    /// The first run of the set at or after page `from`, at most `max` pages long.
    pub fn next_run(&self, from: u64, max: u64) -> Option<PageRun> {
        let first = self.next_bit(from, self.pages, 0)?;
        let limit = first.saturating_add(max).min(self.pages);
        let end = self.next_bit(first, limit, !0).unwrap_or(limit);
        Some(PageRun::new(first, end - first))
    }

    /// The maximal runs of the set in ascending order.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_within(PageRun::new(0, self.pages))
    }

    /// The runs of the set that lie in `range`, cut at its borders, in ascending order.
    pub fn runs_within(&self, range: PageRun) -> Runs<'_> {
        Runs { set: self, from: range.first.0, end: range.end() }
    }

    /// The first page number from `from` on and below `end` whose bit differs from that of `flip` (all zeros: the next member; all ones: the next
    /// page that is no member).
    fn next_bit(&self, from: u64, end: u64, flip: u64) -> Option<u64> {
        if from >= end {
            return None;
        }
        let start = (from / 64) as usize;
        let words = self.words.get(start..end.div_ceil(64) as usize)?;
        let mut skip = !0 << (from % 64);
        for (index, &word) in (start..).zip(words) {
            let bits = (word ^ flip) & skip;
            if bits != 0 {
                let page = index as u64 * 64 + u64::from(bits.trailing_zeros());
                return (page < end).then_some(page);
            }
            skip = !0;
        }
        None
    }

    fn valid_bits(&self, index: usize) -> u64 {
        let left = self.pages.saturating_sub(index as u64 * 64);
        if left >= 64 { !0 } else { (1 << left) - 1 }
    }

    fn for_each_word(&mut self, run: PageRun, mut change: impl FnMut(&mut u64, u64)) {
        let end = run.end().min(self.pages);
        let mut page = run.first.0;
        while page < end {
            let (index, bit) = ((page / 64) as usize, page % 64);
            let count = (64 - bit).min(end - page);
            let mask = if count == 64 { !0 } else { ((1 << count) - 1) << bit };
            if let Some(word) = self.words.get_mut(index) {
                let before = word.count_ones();
                change(word, mask);
                self.len = self.len + u64::from(word.count_ones()) - u64::from(before);
            }
            page += count;
        }
    }
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
        let first = self.set.next_bit(self.from, end, 0)?;
        self.from = self.set.next_bit(first, end, !0).unwrap_or(end);
        Some(PageRun::new(first, self.from - first))
    }
}

#[cfg(test)]
mod tests;
