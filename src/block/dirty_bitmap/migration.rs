//! Moving bitmaps with the guest, by the scheme of QEMU's block-dirty-bitmap migration.
//!
//! The source's bits are final once the guest is paused there, and may arrive at the destination long after it runs again. So the destination
//! makes the bitmap disabled and gives it a *successor* that records what the guest changes meanwhile; when all bits have come, the
//! successor is merged in. Losing a bitmap costs a full backup, a wrong one costs data: a bitmap that does not complete is dropped.

use std::sync::Arc;

use bitvec::vec::BitVec;

use super::bits::Bits;
use super::{BitmapError, DirtyBitmap, DirtyBitmaps, Granularity, Role, get, get_mut};

/// Words in a chunk, the unit in which bits travel: 1 KiB of bitmap.
pub const CHUNK_WORDS: u64 = 128;

/// A piece of a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapChunk {
    /// Index of the first word, a multiple of [`CHUNK_WORDS`].
    pub first_word: u64,
    /// The words, [`CHUNK_WORDS`] of them except at the bitmap's end; bit 0 of the bitmap's word 0 is the beginning of the disk.
    pub words: Vec<u64>,
}

impl BitmapChunk {
    /// Whether nothing in it is dirty, so that it need not travel as words.
    pub fn is_zero(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
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
    /// Reserves every bitmap that is not in use, nor inconsistent, for a migration to another host.
    pub fn outgoing(self: &Arc<Self>) -> Vec<OutgoingBitmap> {
        let mut bitmaps = self.write();
        let idle = bitmaps.iter_mut().filter(|bitmap| bitmap.is_idle() && !bitmap.inconsistent);
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

    /// How many chunks it has.
    pub fn chunks(&self) -> u64 {
        self.words.div_ceil(CHUNK_WORDS)
    }

    /// The chunk at `index`, counted in chunks; final once the guest is paused. Beyond the end it has no words.
    pub fn chunk(&self, index: u64) -> BitmapChunk {
        let first_word = index.saturating_mul(CHUNK_WORDS).min(self.words);
        let end = (first_word + CHUNK_WORDS).min(self.words);
        let bitmaps = self.bitmaps.read();
        // The bitmap is there: nothing can remove it while it is outgoing.
        let words = get(&bitmaps, &self.name).map(|bitmap| (first_word..end).map(|word| bitmap.bits.word(word)).collect());
        BitmapChunk { first_word, words: words.unwrap_or_default() }
    }
}

impl Drop for OutgoingBitmap {
    fn drop(&mut self) {
        if let Ok(bitmap) = get_mut(&mut self.bitmaps.write(), &self.name) {
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

    /// Loads one or more chunks from word `first_word` on, which is a multiple of [`CHUNK_WORDS`]; only the last chunk may be shorter. Loading
    /// a chunk again is harmless. The guest may run.
    pub fn load_chunk(&mut self, first_word: u64, words: &[u64]) -> Result<(), BitmapError> {
        self.note_loaded(first_word, words.len() as u64)?;
        let bitmaps = self.bitmaps.read();
        let bitmap = get(&bitmaps, &self.name)?;
        for (index, &word) in (first_word..).zip(words) {
            bitmap.bits.or_word(index, word);
        }
        Ok(())
    }

    /// Like [`IncomingBitmap::load_chunk`] for `count` words that are all zero.
    pub fn load_zeroes(&mut self, first_word: u64, count: u64) -> Result<(), BitmapError> {
        self.note_loaded(first_word, count)
    }

    /// Merges the successor in, at one moment for the guest's writes, and makes the bitmap what it was at the source. An incomplete bitmap is
    /// dropped instead.
    pub fn complete(self) -> Result<(), BitmapError> {
        let missing = self.loaded.count_zeros() as u64;
        if missing > 0 {
            return Err(BitmapError::Incomplete { name: self.name.clone(), missing });
        }
        let mut bitmaps = self.bitmaps.write();
        let bitmap = get_mut(&mut bitmaps, &self.name)?;
        if let Role::Incoming { successor: Some(successor) } = std::mem::replace(&mut bitmap.role, Role::Idle) {
            bitmap.bits.merge(&successor);
            bitmap.enabled = true;
        }
        Ok(())
    }

    /// Gives the bitmap up: it disappears, and with it what the guest changed meanwhile.
    pub fn abandon(self) {}

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
        self.bitmaps.write().retain(|bitmap| !unfinished(bitmap));
    }
}
