//! Accounting for dirty bitmaps on their way: which words are next, and whether all have come.

use super::wire::{BitmapInfo, BitmapPlace};

/// What the source sends next of its bitmaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapStep {
    /// Words from `first` on, as many as go together.
    Words {
        /// Index of the bitmap in the package.
        index: u32,
        /// First word.
        first: u64,
    },
    /// All words of this bitmap have been sent.
    Complete(u32),
}

/// The source's place in its bitmaps.
#[derive(Clone, Debug, Default)]
pub struct OutgoingBitmaps {
    words: Vec<u64>,
    index: usize,
    next: u64,
}

impl OutgoingBitmaps {
    /// Begins with the first word of the first bitmap.
    pub fn new(infos: &[BitmapInfo]) -> Self {
        OutgoingBitmaps { words: infos.iter().map(BitmapInfo::words).collect(), index: 0, next: 0 }
    }

    /// Whether there are no bitmaps to send, not even sent ones.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Goes on, or back, to `place`, up to which everything has come. An error where no such place is.
    pub fn go_to(&mut self, place: BitmapPlace) -> Result<(), String> {
        let words = match usize::try_from(place.index) {
            Ok(index) if index == self.words.len() => Some(0),
            Ok(index) => self.words.get(index).copied(),
            Err(_) => None,
        };
        if words.is_none_or(|words| place.words > words) {
            return Err(format!("the destination claims to have {} words of bitmap {}", place.words, place.index));
        }
        (self.index, self.next) = (place.index as usize, place.words);
        Ok(())
    }

    /// The next step; nothing when all bitmaps are complete. The words are to be [`sent`](Self::sent) before it is asked again.
    pub fn next_step(&mut self) -> Option<BitmapStep> {
        let words = *self.words.get(self.index)?;
        let index = self.index as u32;
        if self.next == words {
            (self.index, self.next) = (self.index + 1, 0);
            return Some(BitmapStep::Complete(index));
        }
        Some(BitmapStep::Words { index, first: self.next })
    }

    /// `count` words of the step have been sent.
    pub fn sent(&mut self, count: u64) {
        let words = self.words.get(self.index).copied().unwrap_or(0);
        self.next = self.next.saturating_add(count).min(words);
    }
}

/// The destination's account of what has come: bitmaps in order, words in order, nothing left out.
#[derive(Clone, Debug, Default)]
pub struct IncomingBitmaps {
    words: Vec<u64>,
    index: usize,
    next: u64,
}

impl IncomingBitmaps {
    /// Expects all words of `infos`.
    pub fn new(infos: &[BitmapInfo]) -> Self {
        IncomingBitmaps { words: infos.iter().map(BitmapInfo::words).collect(), index: 0, next: 0 }
    }

    /// Accounts for `count` words of bitmap `index` from `first` on; an error means that something is missing or comes twice.
    pub fn words(&mut self, index: u32, first: u64, count: u64) -> Result<(), String> {
        let total = self.words.get(self.index).copied().unwrap_or(0);
        if index as usize != self.index || first != self.next || count == 0 || count > total.saturating_sub(first) {
            return Err(format!(
                "bitmap {index} words {first}+{count} came where bitmap {} word {} of {total} was due",
                self.index, self.next
            ));
        }
        self.next += count;
        Ok(())
    }

    /// Bitmap `index` is said to be complete; an error means that it is not.
    pub fn complete(&mut self, index: u32) -> Result<(), String> {
        if index as usize != self.index || self.words.get(self.index) != Some(&self.next) {
            return Err(format!("bitmap {index} was called complete at word {} of bitmap {}", self.next, self.index));
        }
        (self.index, self.next) = (self.index + 1, 0);
        Ok(())
    }

    /// How far they have come.
    pub fn place(&self) -> BitmapPlace {
        BitmapPlace { index: self.index as u32, words: self.next }
    }

    /// Whether every bitmap is complete.
    pub fn all_complete(&self) -> bool {
        self.index == self.words.len()
    }
}
