//! Dirty bitmaps: which parts of a disk the guest changed, for incremental backup.
//!
//! The disk's thread marks a range *after* it changed the image and *before* it acknowledges the change to the guest. Marked earlier, a
//! bitmap that is cleared or added between the mark and the change would miss the change; marked later, the guest could rely on a change that no
//! bitmap knows of.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use thiserror::Error;

mod bits;
mod migration;

use bits::Bits;
pub use migration::{BitmapChunk, CHUNK_WORDS, IncomingBitmap, OutgoingBitmap};

/// Longest name of a bitmap in bytes, as in QEMU (`BDRV_BITMAP_MAX_NAME_SIZE`).
pub const MAX_NAME: usize = 1023;
/// What all bitmaps of one disk may take together, in bytes. While a bitmap arrives with a migration, its successor takes as much again.
pub const MAX_BYTES: u64 = 256 << 20;

/// Why an operation on a disk's bitmaps was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BitmapError {
    /// Not a usable granularity.
    #[error("bitmap granularity {0} is not a power of two from 512 to 2147483648")]
    Granularity(u64),
    /// The name is empty or too long.
    #[error("a bitmap's name has 1 to {MAX_NAME} bytes, not {0}")]
    Name(usize),
    /// The name is taken.
    #[error("bitmap '{0}' already exists")]
    Exists(String),
    /// There is no such bitmap.
    #[error("bitmap '{0}' does not exist")]
    NotFound(String),
    /// A migration is using the bitmap.
    #[error("bitmap '{0}' is in use by a migration")]
    Busy(String),
    /// The bitmap would take too much memory.
    #[error("bitmap '{name}' would bring this disk's bitmaps to {bytes} bytes, more than {MAX_BYTES}; choose a larger granularity")]
    TooLarge {
        /// The refused bitmap.
        name: String,
        /// What all bitmaps would take, in bytes.
        bytes: u64,
    },
    /// A chunk does not begin or end where chunks of this bitmap do.
    #[error("bitmap '{name}': words {first}+{count} are no chunks of its {words} words")]
    Chunk {
        /// The bitmap.
        name: String,
        /// First word of the refused chunk.
        first: u64,
        /// How many words it has.
        count: u64,
        /// How many words the bitmap has.
        words: u64,
    },
    /// The source says that the bitmap is complete, but a part of it never came.
    #[error("bitmap '{name}' is incomplete: {missing} of its chunks never arrived")]
    Incomplete {
        /// The bitmap.
        name: String,
        /// How many chunks of [`CHUNK_WORDS`] words are missing.
        missing: u64,
    },
}

/// How many bytes of the disk one bit stands for: a power of two from 512 to 2 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granularity(u32);

impl Granularity {
    /// Checks `bytes`.
    pub fn new(bytes: u64) -> Result<Self, BitmapError> {
        match u32::try_from(bytes) {
            Ok(valid) if valid.is_power_of_two() && valid >= 512 => Ok(Granularity(valid)),
            _ => Err(BitmapError::Granularity(bytes)),
        }
    }

    /// In bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }
}

impl Default for Granularity {
    /// 64 KiB, as in QEMU.
    fn default() -> Self {
        Granularity(64 << 10)
    }
}

/// A bitmap as `query-block` shows it (QEMU's `BlockDirtyInfo`). Bitmaps are never persistent and never inconsistent here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes of the disk for each bit.
    pub granularity: Granularity,
    /// Whether new changes are recorded, in the bitmap or its successor.
    pub recording: bool,
    /// Whether a migration is using it, so that nothing else may.
    pub busy: bool,
    /// Bytes of the disk that are dirty, without those in a successor.
    pub count: u64,
}

#[derive(Debug)]
struct DirtyBitmap {
    name: String,
    bits: Bits,
    enabled: bool,
    role: Role,
}

/// What a migration does with a bitmap.
#[derive(Debug)]
enum Role {
    Idle,
    /// Being read for the destination; changes are still recorded as before.
    Outgoing,
    /// Being filled from the source. Where the source was recording, the guest's changes gather in the successor meanwhile.
    Incoming {
        successor: Option<Bits>,
    },
}

impl DirtyBitmap {
    fn recording(&self) -> bool {
        self.enabled || matches!(self.role, Role::Incoming { successor: Some(_) })
    }

    fn mark(&self, offset: u64, length: u64) {
        match &self.role {
            Role::Incoming { successor: Some(successor) } => successor.set(offset, length),
            _ if self.enabled => self.bits.set(offset, length),
            _ => {}
        }
    }

    fn idle(&mut self) -> Result<&mut Self, BitmapError> {
        if matches!(self.role, Role::Idle) { Ok(self) } else { Err(BitmapError::Busy(self.name.clone())) }
    }
}

/// All bitmaps of one disk. Marking is a shared lock and atomic ors; everything that changes which bitmaps record, and what an operation must see
/// at one moment, holds the lock alone, for as long as it takes to pass over words in memory.
#[derive(Debug)]
pub struct DirtyBitmaps {
    disk_size: u64,
    bitmaps: RwLock<Vec<DirtyBitmap>>,
}

/// The right to change the disk's content, and the duty to mark what was changed.
#[derive(Debug)]
pub struct Recording<'a>(RwLockReadGuard<'a, Vec<DirtyBitmap>>);

impl Recording<'_> {
    /// Records a change of `length` bytes at `offset` in every bitmap that is recording. A range beyond the disk's end is cut off there.
    pub fn mark(self, offset: u64, length: u64) {
        for bitmap in self.0.iter() {
            bitmap.mark(offset, length);
        }
    }
}

/// The bitmaps of a disk whose content nothing changes meanwhile.
#[derive(Debug)]
pub struct HeldBitmaps<'a>(#[expect(dead_code, reason = "held, not used")] RwLockWriteGuard<'a, Vec<DirtyBitmap>>);

impl DirtyBitmaps {
    /// No bitmaps, for a disk of `disk_size` bytes.
    pub fn new(disk_size: u64) -> Arc<Self> {
        Arc::new(DirtyBitmaps { disk_size, bitmaps: RwLock::default() })
    }

    /// To be called before a change and marked after it. Waits for an operation on bitmaps that is going on.
    pub fn recording(&self) -> Recording<'_> {
        Recording(self.read())
    }

    /// Records a change that cannot be told apart from its mark.
    pub fn mark(&self, offset: u64, length: u64) {
        self.recording().mark(offset, length);
    }

    /// Holds the bitmaps alone. Waits for the changes of content that are going on.
    pub fn hold(&self) -> HeldBitmaps<'_> {
        HeldBitmaps(self.write())
    }

    /// Adds an empty bitmap.
    pub fn add(&self, name: &str, granularity: Granularity, enabled: bool) -> Result<(), BitmapError> {
        self.insert(name, granularity, |bits| DirtyBitmap { name: name.to_owned(), bits, enabled, role: Role::Idle })
    }

    /// Removes a bitmap.
    pub fn remove(&self, name: &str) -> Result<(), BitmapError> {
        let mut bitmaps = self.write();
        get_mut(&mut bitmaps, name)?.idle()?;
        bitmaps.retain(|bitmap| bitmap.name != name);
        Ok(())
    }

    /// Forgets everything that a bitmap recorded.
    pub fn clear(&self, name: &str) -> Result<(), BitmapError> {
        get_mut(&mut self.write(), name)?.idle()?.bits.clear();
        Ok(())
    }

    /// Makes a bitmap record from now on, or stops it.
    pub fn set_enabled(&self, name: &str, enabled: bool) -> Result<(), BitmapError> {
        get_mut(&mut self.write(), name)?.idle()?.enabled = enabled;
        Ok(())
    }

    /// Marks in `target` what is dirty in any of `sources`, whose granularities may differ from the target's. All or nothing.
    pub fn merge(&self, target: &str, sources: &[&str]) -> Result<(), BitmapError> {
        let mut bitmaps = self.write();
        for name in sources.iter().chain([&target]) {
            get_mut(&mut bitmaps, name)?.idle()?;
        }
        let target = get(&bitmaps, target)?;
        for source in sources {
            target.bits.merge(&get(&bitmaps, source)?.bits);
        }
        Ok(())
    }

    /// Every bitmap, in the order they were added.
    pub fn info(&self) -> Vec<BitmapInfo> {
        let describe = |bitmap: &DirtyBitmap| BitmapInfo {
            name: bitmap.name.clone(),
            granularity: bitmap.bits.granularity(),
            recording: bitmap.recording(),
            busy: !matches!(bitmap.role, Role::Idle),
            count: bitmap.bits.dirty_bytes(),
        };
        self.read().iter().map(describe).collect()
    }

    /// The maximal dirty ranges of a bitmap, as bytes of the disk in ascending order.
    pub fn dirty_ranges(&self, name: &str) -> Result<Vec<std::ops::Range<u64>>, BitmapError> {
        Ok(get(&self.read(), name)?.bits.ranges())
    }

    /// Adds the bitmap that `make` makes of its bits, which may allocate as many again for a successor.
    fn insert(&self, name: &str, granularity: Granularity, make: impl FnOnce(Bits) -> DirtyBitmap) -> Result<(), BitmapError> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(BitmapError::Name(name.len()));
        }
        let mut bitmaps = self.write();
        if bitmaps.iter().any(|bitmap| bitmap.name == name) {
            return Err(BitmapError::Exists(name.to_owned()));
        }
        // Bounded before anything is allocated: granularity, names and number can come from the peer of a migration.
        let present: u64 = bitmaps.iter().map(|bitmap| Bits::footprint(self.disk_size, bitmap.bits.granularity())).sum();
        let bytes = present.saturating_add(Bits::footprint(self.disk_size, granularity));
        if bytes > MAX_BYTES {
            return Err(BitmapError::TooLarge { name: name.to_owned(), bytes });
        }
        bitmaps.push(make(Bits::new(self.disk_size, granularity)));
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<DirtyBitmap>> {
        self.bitmaps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<DirtyBitmap>> {
        self.bitmaps.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn get<'a>(bitmaps: &'a [DirtyBitmap], name: &str) -> Result<&'a DirtyBitmap, BitmapError> {
    bitmaps.iter().find(|bitmap| bitmap.name == name).ok_or_else(|| BitmapError::NotFound(name.to_owned()))
}

fn get_mut<'a>(bitmaps: &'a mut [DirtyBitmap], name: &str) -> Result<&'a mut DirtyBitmap, BitmapError> {
    bitmaps.iter_mut().find(|bitmap| bitmap.name == name).ok_or_else(|| BitmapError::NotFound(name.to_owned()))
}

#[cfg(test)]
mod tests;
