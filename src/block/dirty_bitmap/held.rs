//! Operations on bitmaps, all or nothing.

use std::sync::{Arc, RwLockWriteGuard};

use super::bits::Bits;
use super::{BitmapError, DirtyBitmap, Granularity, MAX_BYTES, MAX_NAME, Recorders, Role, get, get_mut};

/// The bitmaps of a disk that nothing changes meanwhile, and what they are to become: operations are done on a draft, which takes effect with
/// [`HeldBitmaps::commit`] and is forgotten otherwise.
#[derive(Debug)]
pub struct HeldBitmaps<'a> {
    disk_size: u64,
    recorders: RwLockWriteGuard<'a, Recorders>,
    /// Shares the bits with the bitmaps where nothing was done to them.
    draft: Vec<DirtyBitmap>,
}

/// What a bitmap has recorded, to be merged into another, perhaps of another disk.
#[derive(Clone, Debug)]
pub struct MergeSource(Arc<Bits>);

impl<'a> HeldBitmaps<'a> {
    pub(super) fn new(disk_size: u64, recorders: RwLockWriteGuard<'a, Recorders>) -> Self {
        let draft = recorders.bitmaps.clone();
        HeldBitmaps { disk_size, recorders, draft }
    }

    /// Adds an empty bitmap.
    pub fn add(&mut self, name: &str, granularity: Granularity, enabled: bool, persistent: bool) -> Result<(), BitmapError> {
        let name = name.to_owned();
        self.insert(&name.clone(), granularity, |bits| DirtyBitmap {
            name,
            bits: Arc::new(bits),
            enabled,
            persistent,
            inconsistent: false,
            role: Role::Idle,
        })
    }

    /// Removes a bitmap.
    pub fn remove(&mut self, name: &str) -> Result<(), BitmapError> {
        if !get(&self.draft, name)?.is_idle() {
            return Err(BitmapError::Busy(name.to_owned()));
        }
        self.draft.retain(|bitmap| bitmap.name != name);
        Ok(())
    }

    /// Forgets everything that a bitmap recorded.
    pub fn clear(&mut self, name: &str) -> Result<(), BitmapError> {
        let disk_size = self.disk_size;
        let bitmap = self.usable(name)?;
        bitmap.bits = Arc::new(Bits::new(disk_size, bitmap.bits.granularity()));
        Ok(())
    }

    /// Makes a bitmap record from now on, or stops it.
    pub fn set_enabled(&mut self, name: &str, enabled: bool) -> Result<(), BitmapError> {
        self.usable(name)?.enabled = enabled;
        Ok(())
    }

    /// What a bitmap has recorded until now.
    pub fn source(&mut self, name: &str) -> Result<MergeSource, BitmapError> {
        Ok(MergeSource(self.usable(name)?.bits.clone()))
    }

    /// Marks in `target` what is dirty in any of `sources`, whose granularities may differ from the target's; their disks have the same size.
    pub fn merge(&mut self, target: &str, sources: &[MergeSource]) -> Result<(), BitmapError> {
        let disk_size = self.disk_size;
        let target = self.usable(target)?;
        if let Some(other) = sources.iter().map(|source| source.0.disk_size()).find(|size| *size != disk_size) {
            return Err(BitmapError::Sizes { target: disk_size, source_size: other });
        }
        if Arc::get_mut(&mut target.bits).is_none() {
            target.bits = Arc::new(target.bits.copy());
        }
        sources.iter().for_each(|source| target.bits.merge(&source.0));
        Ok(())
    }

    /// Makes the draft what the bitmaps are.
    pub fn commit(mut self) {
        std::mem::swap(&mut self.recorders.bitmaps, &mut self.draft);
        // In this order: to free what is not needed any more can take longer than all that came before, and the guest does not wait for it.
        drop(self.recorders);
        drop(self.draft);
    }

    /// Adds the bitmap that `make` makes of its bits, which may allocate as many again for a successor.
    pub(super) fn insert(
        &mut self,
        name: &str,
        granularity: Granularity,
        make: impl FnOnce(Bits) -> DirtyBitmap,
    ) -> Result<(), BitmapError> {
        if name.is_empty() {
            return Err(BitmapError::NoName);
        }
        if self.draft.iter().any(|bitmap| bitmap.name == name) {
            return Err(BitmapError::Exists(name.to_owned()));
        }
        if name.len() > MAX_NAME {
            return Err(BitmapError::LongName(name.to_owned()));
        }
        // Bounded before anything is allocated: granularity, names and number can come from the peer of a migration.
        let present: u64 = self.draft.iter().map(|bitmap| Bits::footprint(self.disk_size, bitmap.bits.granularity())).sum();
        let bytes = present.saturating_add(Bits::footprint(self.disk_size, granularity));
        if bytes > MAX_BYTES {
            return Err(BitmapError::TooLarge { name: name.to_owned(), bytes });
        }
        self.draft.push(make(Bits::new(self.disk_size, granularity)));
        Ok(())
    }

    fn usable(&mut self, name: &str) -> Result<&mut DirtyBitmap, BitmapError> {
        match get_mut(&mut self.draft, name)? {
            bitmap if !bitmap.is_idle() => Err(BitmapError::Busy(name.to_owned())),
            bitmap if bitmap.inconsistent => Err(BitmapError::Inconsistent(name.to_owned())),
            bitmap => Ok(bitmap),
        }
    }
}
