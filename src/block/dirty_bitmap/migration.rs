//! Moving bitmaps with the guest, by the scheme of QEMU's block-dirty-bitmap migration.
//!
//! The source's bits are final once the guest is paused there, and may arrive at the destination long after it runs again. So the destination
//! makes the bitmap disabled and gives it a *successor* that records what the guest changes meanwhile; when all bits have come, the
//! successor is merged in. Losing a bitmap costs a full backup, a wrong one costs data: a bitmap that does not complete is dropped.

use std::ops::Range;
use std::sync::Arc;

use bitvec::vec::BitVec;

use super::bits::Bits;
use super::{BitmapError, DirtyBitmap, DirtyBitmaps, Granularity, Role, get, get_mut};

/// Words in a chunk, the unit in which bits travel: 1 KiB of bitmap.
pub const CHUNK_WORDS: u64 = 128;

/// Consecutive words of a bitmap. Bit 0 of the bitmap's word 0 is the beginning of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapRun {
    /// So many words without a set bit.
    Zeroes(u64),
    /// So many words in which all bits are set.
    Ones(u64),
    /// The words.
    Words(Vec<u64>),
}

/// Most words that one [`BitmapRun`] may have: multiples of [`CHUNK_WORDS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunLimits {
    /// Of those without a set bit.
    pub zeroes: u64,
    /// Of those in which all are set.
    pub ones: u64,
    /// Of any others, and of all where the limit above is zero.
    pub words: u64,
}

impl BitmapRun {
    /// The first of `words` whose chunks are alike; `word` is what to find at an index. A bitmap of many MiB is mostly one or the other.
    pub fn first_of(words: Range<u64>, limits: RunLimits, word: impl Fn(u64) -> u64) -> Self {
        let chunk = |first: u64| first..(first + CHUNK_WORDS).min(words.end);
        // What all words of a chunk are, if they may go as that.
        let alike = |first| {
            let is_all = |value| chunk(first).all(|index| word(index) == value);
            [(0, limits.zeroes), (!0, limits.ones)].into_iter().find(|(value, limit)| *limit > 0 && is_all(*value))
        };
        let kind = alike(words.start);
        let limit = kind.map_or(limits.words, |(_, limit)| limit);
        let mut end = chunk(words.start).end;
        while end < words.end && end - words.start + CHUNK_WORDS <= limit && alike(end) == kind {
            end = chunk(end).end;
        }
        match kind {
            Some((0, _)) => BitmapRun::Zeroes(end - words.start),
            Some(_) => BitmapRun::Ones(end - words.start),
            None => BitmapRun::Words((words.start..end).map(word).collect()),
        }
    }

    /// How many words they are.
    pub fn count(&self) -> u64 {
        match self {
            BitmapRun::Zeroes(count) | BitmapRun::Ones(count) => *count,
            BitmapRun::Words(words) => words.len() as u64,
        }
    }
}

/// A bitmap that a migration takes away. It goes on recording, but until this is dropped no other operation may use it.
#[derive(Debug)]
pub struct OutgoingBitmap {
    bitmaps: Arc<DirtyBitmaps>,
    name: String,
    granularity: Granularity,
    enabled: bool,
    persistent: bool,
    words: u64,
}

/// A bitmap that a migration brings. Dropped without [`IncomingBitmap::complete`], the bitmap disappears.
#[derive(Debug)]
pub struct IncomingBitmap {
    bitmaps: Arc<DirtyBitmaps>,
    name: String,
    words: u64,
    /// One bit for each chunk.
    loaded: BitVec,
}

impl DirtyBitmaps {
    /// Reserves those bitmaps, by name, that are to go and neither in use nor inconsistent, for a migration to another host.
    pub fn outgoing(self: &Arc<Self>, is_to_go: impl Fn(&str) -> bool) -> Vec<OutgoingBitmap> {
        let mut recorders = self.write();
        let idle = recorders.bitmaps.iter_mut().filter(|bitmap| bitmap.is_idle() && !bitmap.inconsistent && is_to_go(&bitmap.name));
        let reserve = |bitmap: &mut DirtyBitmap| {
            bitmap.role = Role::Outgoing;
            let (granularity, words) = (bitmap.bits.granularity(), bitmap.bits.words());
            let (enabled, persistent) = (bitmap.enabled, bitmap.persistent);
            OutgoingBitmap { bitmaps: self.clone(), name: bitmap.name.clone(), granularity, enabled, persistent, words }
        };
        idle.map(reserve).collect()
    }

    /// Makes room for a bitmap of the source, before the guest runs here. `enabled` and `persistent` are what it was at the source.
    pub fn incoming(
        self: &Arc<Self>,
        name: &str,
        granularity: Granularity,
        enabled: bool,
        persistent: bool,
    ) -> Result<IncomingBitmap, BitmapError> {
        let mut words = 0;
        let make = |bits: Bits| {
            words = bits.words();
            let successor = enabled.then(|| Arc::new(Bits::new(self.disk_size, granularity)));
            let (name, bits, role) = (name.to_owned(), Arc::new(bits), Role::Incoming { successor });
            DirtyBitmap { name, bits, enabled: false, persistent, inconsistent: false, role }
        };
        self.change(|held| held.insert(name, granularity, make))?;
        let loaded = BitVec::repeat(false, words.div_ceil(CHUNK_WORDS) as usize);
        Ok(IncomingBitmap { bitmaps: self.clone(), name: name.to_owned(), words, loaded })
    }
}

impl OutgoingBitmap {
    /// The bitmap's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its granularity.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Whether it is recording, and so shall be at the destination.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Whether it is to outlive the destination's process.
    pub fn persistent(&self) -> bool {
        self.persistent
    }

    /// How many words it has.
    pub fn words(&self) -> u64 {
        self.words
    }

    /// Its words from `first` on, as many as go together; final once the guest is paused. Beyond the end there are none.
    pub fn run(&self, first: u64, limits: RunLimits) -> BitmapRun {
        let recorders = self.bitmaps.read();
        // The bitmap is there: nothing can remove it while it is outgoing.
        let bits = get(&recorders.bitmaps, &self.name).map(|bitmap| &bitmap.bits);
        BitmapRun::first_of(first.min(self.words)..self.words, limits, |index| bits.as_ref().map_or(0, |bits| bits.word(index)))
    }
}

impl Drop for OutgoingBitmap {
    fn drop(&mut self) {
        if let Ok(bitmap) = get_mut(&mut self.bitmaps.write().bitmaps, &self.name) {
            bitmap.role = Role::Idle;
        }
    }
}

impl IncomingBitmap {
    /// The bitmap's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many chunks it has; the source must count the same.
    pub fn chunks(&self) -> u64 {
        self.loaded.len() as u64
    }

    /// Loads words from `first` on, in whole chunks of [`CHUNK_WORDS`]; only the bitmap's last may be shorter. Loading a chunk again is
    /// harmless. The guest may run.
    pub fn load(&mut self, first: u64, run: &BitmapRun) -> Result<(), BitmapError> {
        self.note_loaded(first, run.count())?;
        let recorders = self.bitmaps.read();
        let bits = &get(&recorders.bitmaps, &self.name)?.bits;
        match run {
            BitmapRun::Zeroes(_) => {}
            BitmapRun::Ones(count) => (first..first + count).for_each(|index| bits.or_word(index, !0)),
            BitmapRun::Words(words) => (first..).zip(words).for_each(|(index, word)| bits.or_word(index, *word)),
        }
        Ok(())
    }

    /// Merges the successor in, at one moment for the guest's writes, and makes the bitmap what it was at the source. An incomplete bitmap is
    /// dropped instead.
    pub fn complete(self) -> Result<(), BitmapError> {
        let missing = self.loaded.count_zeros() as u64;
        if missing > 0 {
            return Err(BitmapError::Incomplete { name: self.name.clone(), missing });
        }
        let mut recorders = self.bitmaps.write();
        let bitmap = get_mut(&mut recorders.bitmaps, &self.name)?;
        if let Role::Incoming { successor: Some(successor) } = std::mem::replace(&mut bitmap.role, Role::Idle) {
            bitmap.bits.merge(&successor);
            bitmap.enabled = true;
        }
        Ok(())
    }

    fn note_loaded(&mut self, first: u64, count: u64) -> Result<(), BitmapError> {
        let end = first.checked_add(count).filter(|&end| end <= self.words);
        let aligned = |word: u64| word.is_multiple_of(CHUNK_WORDS);
        match end {
            Some(end) if count > 0 && aligned(first) && (aligned(end) || end == self.words) => {
                let chunks = (first / CHUNK_WORDS) as usize..end.div_ceil(CHUNK_WORDS) as usize;
                if let Some(loaded) = self.loaded.get_mut(chunks) {
                    loaded.fill(true);
                }
                Ok(())
            }
            _ => Err(BitmapError::Chunk { name: self.name.clone(), first, count, words: self.words }),
        }
    }
}

impl Drop for IncomingBitmap {
    fn drop(&mut self) {
        // A completed bitmap is idle by now, and may have been removed and added again since: only what is still incoming goes.
        let unfinished = |bitmap: &DirtyBitmap| bitmap.name == self.name && matches!(bitmap.role, Role::Incoming { .. });
        self.bitmaps.write().bitmaps.retain(|bitmap| !unfinished(bitmap));
    }
}
