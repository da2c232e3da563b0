//! Dirty bitmaps: which parts of a disk the guest changed, for incremental backup.
//!
//! Whoever changes an image holds a [`Recording`] from before the change until it is marked, and marks it before it acknowledges the change.
//! Marked later, the guest could rely on a change that no bitmap knows of. An operation on bitmaps ([`HeldBitmaps`]) waits for the recordings,
//! so each change, with its mark, falls before it or after it as a whole: also when the operation is one on several disks.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use sha2::{Digest, Sha256};
use thiserror::Error;

mod bits;
mod changed;
mod held;
mod migration;
mod stored;

use bits::Bits;
pub use changed::{ChangeTracking, ChangedBlocks};
pub use held::{HeldBitmaps, MergeSource};
pub use migration::{BitmapRun, CHUNK_WORDS, IncomingBitmap, OutgoingBitmap, RunLimits};

/// Longest name of a bitmap in bytes, as in QEMU (`BDRV_BITMAP_MAX_NAME_SIZE`).
pub const MAX_NAME: usize = 1023;
/// What all bitmaps of one disk may take together, in bytes: 15 of 512 bytes granularity on a 256 GiB disk are half of it. While a bitmap
/// arrives with a migration, its successor takes as much again.
pub const MAX_BYTES: u64 = 2 << 30;

/// Why an operation on a disk's bitmaps was refused. Where QEMU can refuse it as well, the words are QEMU's.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BitmapError {
    /// Not a usable granularity.
    #[error("Granularity must be power of 2 and at least 512")]
    Granularity(u64),
    /// The name is empty.
    #[error("Bitmap name cannot be empty")]
    NoName,
    /// The name is longer than [`MAX_NAME`].
    #[error("Bitmap name too long: {0}")]
    LongName(String),
    /// The name is taken.
    #[error("Bitmap already exists: {0}")]
    Exists(String),
    /// There is no such bitmap.
    #[error("Dirty bitmap '{0}' not found")]
    NotFound(String),
    /// A migration is using the bitmap.
    #[error("Bitmap '{0}' is currently in use by another operation and cannot be used")]
    Busy(String),
    /// What the bitmap recorded is not all that was changed.
    #[error("Bitmap '{0}' is inconsistent and cannot be used")]
    Inconsistent(String),
    /// Bitmaps of disks of different sizes cannot be merged.
    #[error("Bitmaps are of different sizes (destination size is {target}, source size is {source_size}) and can't be merged")]
    Sizes {
        /// Size of the disk whose bitmap was to take the other in, in bytes.
        target: u64,
        /// Size of the other's disk in bytes.
        source_size: u64,
    },
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

/// A bitmap as `query-block` shows it (QEMU's `BlockDirtyInfo`).
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
    /// Whether it is to outlive this process.
    pub persistent: bool,
    /// Whether it was kept from an earlier run that did not end cleanly, so that all that can be done with it is to remove it.
    pub inconsistent: bool,
    /// Bytes of the disk that are dirty, without those in a successor.
    pub count: u64,
}

#[derive(Clone, Debug)]
struct DirtyBitmap {
    name: String,
    bits: Arc<Bits>,
    enabled: bool,
    persistent: bool,
    inconsistent: bool,
    role: Role,
}

/// What a migration does with a bitmap.
#[derive(Clone, Debug)]
enum Role {
    Idle,
    /// Being read for the destination; changes are still recorded as before.
    Outgoing,
    /// Being filled from the source. Where the source was recording, the guest's changes gather in the successor meanwhile.
    Incoming {
        successor: Option<Arc<Bits>>,
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

    fn is_idle(&self) -> bool {
        matches!(self.role, Role::Idle)
    }
}

/// All bitmaps of one disk. Marking is a shared lock and atomic ors. The lock is free but while an operation passes over words in memory, and
/// what it costs then is not to be seen beside a write (`cargo bench --bench bitmap_recording`).
#[derive(Debug)]
pub struct DirtyBitmaps {
    disk_size: u64,
    recorders: RwLock<Recorders>,
}

/// All that a change is marked in.
#[derive(Debug, Default)]
struct Recorders {
    bitmaps: Vec<DirtyBitmap>,
    /// What each [`ChangeTracking`] has not taken yet.
    tracked: Vec<Arc<Bits>>,
}

/// The right to change the disk's content, and the duty to mark what was changed.
#[derive(Debug)]
pub struct Recording<'a>(RwLockReadGuard<'a, Recorders>);

impl Recording<'_> {
    /// Records a change of `length` bytes at `offset` in every bitmap that is recording. A range beyond the disk's end is cut off there.
    pub fn mark(self, offset: u64, length: u64) {
        self.0.bitmaps.iter().for_each(|bitmap| bitmap.mark(offset, length));
        self.0.tracked.iter().for_each(|bits| bits.set(offset, length));
    }
}

/// What a bitmap held at one moment.
#[derive(Debug)]
pub struct BitmapCopy(Bits);

impl BitmapCopy {
    /// The first extent from the byte `offset`, which lies before `end`, and at most up to there: its length, and whether it is dirty.
    pub fn extent(&self, offset: u64, end: u64) -> (u64, bool) {
        self.0.extent(offset, end)
    }
}

impl DirtyBitmaps {
    /// No bitmaps, for a disk of `disk_size` bytes.
    pub fn new(disk_size: u64) -> Arc<Self> {
        Arc::new(DirtyBitmaps { disk_size, recorders: RwLock::default() })
    }

    /// To be called before a change and marked after it. Waits for an operation on bitmaps that is going on.
    pub fn recording(&self) -> Recording<'_> {
        Recording(self.read())
    }

    /// Records a change that cannot be told apart from its mark.
    pub fn mark(&self, offset: u64, length: u64) {
        self.recording().mark(offset, length);
    }

    /// Holds the bitmaps alone, to operate on them. Waits for the changes of content that are going on. Whoever holds those of several disks
    /// takes them in the order of the disks' ids, so that two who do never wait for each other.
    pub fn hold(&self) -> HeldBitmaps<'_> {
        HeldBitmaps::new(self.disk_size, self.write())
    }

    /// One or more operations on this disk's bitmaps: all of them or, on an error, none.
    pub fn change<T, E>(&self, operate: impl FnOnce(&mut HeldBitmaps<'_>) -> Result<T, E>) -> Result<T, E> {
        let mut held = self.hold();
        let done = operate(&mut held)?;
        held.commit();
        Ok(done)
    }

    /// Adds an empty bitmap that ends with this process.
    pub fn add(&self, name: &str, granularity: Granularity, enabled: bool) -> Result<(), BitmapError> {
        self.change(|held| held.add(name, granularity, enabled, false))
    }

    /// Every bitmap, in the order they were added.
    pub fn info(&self) -> Vec<BitmapInfo> {
        let describe = |bitmap: DirtyBitmap| BitmapInfo {
            granularity: bitmap.bits.granularity(),
            recording: bitmap.recording(),
            busy: !bitmap.is_idle(),
            persistent: bitmap.persistent,
            inconsistent: bitmap.inconsistent,
            count: bitmap.bits.dirty_bytes(),
            name: bitmap.name,
        };
        // Counted without the lock.
        let bitmaps = self.read().bitmaps.clone();
        bitmaps.into_iter().map(describe).collect()
    }

    /// The maximal dirty ranges of a bitmap, as bytes of the disk in ascending order.
    pub fn dirty_ranges(&self, name: &str) -> Result<Vec<std::ops::Range<u64>>, BitmapError> {
        let bitmap = get(&self.read().bitmaps, name)?.clone();
        if bitmap.inconsistent { Err(BitmapError::Inconsistent(bitmap.name)) } else { Ok(bitmap.bits.ranges()) }
    }

    /// What the bitmap holds now, to be looked at while it goes on recording.
    pub fn copy(&self, name: &str) -> Result<BitmapCopy, BitmapError> {
        let bitmap = get(&self.read().bitmaps, name)?.clone();
        match bitmap {
            DirtyBitmap { inconsistent: true, .. } => Err(BitmapError::Inconsistent(bitmap.name)),
            bitmap if !bitmap.is_idle() => Err(BitmapError::Busy(bitmap.name)),
            bitmap => Ok(BitmapCopy(bitmap.bits.copy())),
        }
    }

    /// SHA-256 of the bitmap's words in little-endian order, as QEMU's `x-debug-block-dirty-bitmap-sha256` has it. Of a bitmap that is
    /// recording, what is marked meanwhile may be in it or not.
    pub fn sha256(&self, name: &str) -> Result<String, BitmapError> {
        let bits = get(&self.read().bitmaps, name)?.bits.clone();
        let mut hash = Sha256::new();
        bits.pieces().for_each(|piece| hash.update(piece));
        Ok(format!("{:x}", hash.finalize()))
    }

    fn read(&self) -> RwLockReadGuard<'_, Recorders> {
        self.recorders.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Recorders> {
        self.recorders.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn get<'a>(bitmaps: &'a [DirtyBitmap], name: &str) -> Result<&'a DirtyBitmap, BitmapError> {
    bitmaps.iter().find(|bitmap| bitmap.name == name).ok_or_else(|| BitmapError::NotFound(name.to_owned()))
}

fn get_mut<'a>(bitmaps: &'a mut [DirtyBitmap], name: &str) -> Result<&'a mut DirtyBitmap, BitmapError> {
    bitmaps.iter_mut().find(|bitmap| bitmap.name == name).ok_or_else(|| BitmapError::NotFound(name.to_owned()))
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
