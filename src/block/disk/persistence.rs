//! A disk's persistent bitmaps: taken from the sidecar when a guest boots, useless there while it runs, stored when it has ended.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use super::{Disk, DiskError, Ownership};
use crate::block::dirty_bitmap::Granularity;
use crate::block::image::{ImageError, LockedImage};
use crate::block::sidecar::{Contents, ImageStamp, Sidecar, SidecarError, StoredBitmap};

/// File systems take the time of a change from a clock that can stand still for this long; those that know only seconds for up to two.
const CLOCK_TICK: Duration = Duration::from_millis(20);
const COARSE_TICK: Duration = Duration::from_secs(2);

impl Disk {
    /// Locks the image like [`Disk::acquire`], for a guest that boots, and brings back its persistent bitmaps. Returns what is to be said
    /// about those that are lost or inconsistent. An error, and no lock, where bitmaps of before would be taken for consistent after the
    /// guest wrote.
    pub fn acquire_for_boot(&self) -> Result<Vec<String>, DiskError> {
        let mut ownership = self.ownership();
        if !self.lock_image(&mut ownership)? {
            return Ok(Vec::new());
        }
        let loaded = match (&*ownership, &self.sidecar) {
            (Ownership::Locked(image), Some(sidecar)) => self.load(image, sidecar),
            _ => Ok(Vec::new()),
        };
        loaded.inspect_err(|_| *ownership = Ownership::Closed)
    }

    fn load(&self, image: &LockedImage, sidecar: &Sidecar) -> Result<Vec<String>, DiskError> {
        let (id, path) = (&self.config.id, sidecar.path().display());
        let unusable = |error: SidecarError| {
            let aside = sidecar.set_aside().map_err(|error| self.sidecar_error(error))?;
            Ok(vec![format!("disk {id}: the dirty bitmaps in {path} are lost: {error}; the file is now {}", aside.display())])
        };
        let bytes = match sidecar.read() {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(Vec::new()),
            Err(error) => return unusable(error),
        };
        let mut contents = match Contents::decode(&bytes) {
            Ok(contents) => contents,
            Err(error) => return unusable(error),
        };
        let stamp = self.stamp(image)?;
        let mut warnings = Vec::new();
        if contents.has_bits() {
            let changed = stamp != Some(contents.image);
            let in_use = Contents { image: contents.image, bitmaps: contents.bitmaps.iter().map(listed).collect() };
            // Before the guest can write.
            if let Err(error) = sidecar.write(&in_use) {
                warnings.push(format!("disk {id}: {error}"));
                sidecar.set_aside().map_err(|error| self.sidecar_error(error))?;
            }
            if changed {
                let image = image.image().path().display();
                warnings.push(format!("disk {id}: {image} was changed after its dirty bitmaps had been stored: they are inconsistent"));
                contents.bitmaps = in_use.bitmaps;
            }
        } else {
            warnings.push(format!(
                "disk {id}: the dirty bitmaps in {path} are inconsistent, since a Ferry that had them did not end cleanly or others changed the \
                 image; `ferry bitmap remove` is all that can be done with them"
            ));
        }
        for bitmap in &contents.bitmaps {
            if let Err(error) = self.bitmaps.restore(bitmap) {
                warnings.push(format!("disk {id}: dirty bitmap '{}' is lost: {error}", bitmap.name));
            }
        }
        Ok(warnings)
    }

    /// Why no persistent bitmap can be kept for this disk, if so.
    pub fn refuses_persistent(&self) -> Option<&'static str> {
        match &self.sidecar {
            Some(_) => None,
            None if self.config.readonly => Some("the disk is read-only"),
            None => Some("nothing would tell whether a block device was changed in between; use an image file"),
        }
    }

    /// Brings the names in the sidecar up to date while the image is in use: those of the persistent bitmaps, and `more` that are about to be
    /// added. After a crash these are the bitmaps that are shown as inconsistent. For a guest that has come from another host, to be called
    /// when it is whole: until then what is stored here, of an earlier guest, is told from its bitmaps by the time of the image's last change.
    pub fn list_persistent(&self, more: &[(&str, Granularity)]) -> Result<(), DiskError> {
        // Held until it is written: with the ownership goes the right to write.
        let ownership = self.ownership();
        self.usable(&ownership)?;
        let Some(sidecar) = &self.sidecar else {
            return Err(DiskError::NotOwned(self.config.id.clone()));
        };
        let mut bitmaps = self.bitmaps.listed();
        for (name, granularity) in more {
            if bitmaps.iter().all(|bitmap| bitmap.name != *name) {
                bitmaps.push(StoredBitmap::listed(name, granularity.bytes() as u32));
            }
        }
        let image = ImageStamp { size: self.size, seconds: 0, nanoseconds: 0 };
        sidecar.write(&Contents { image, bitmaps }).map_err(|error| self.sidecar_error(error))
    }

    /// Stores the persistent bitmaps, but not those of a disk that is frozen or has not arrived, and gives the image up for good, if it is owned. An error while a [`DiskIo`](super::DiskIo) exists and
    /// where they cannot be stored: they will be inconsistent.
    pub fn close(&self) -> Result<(), DiskError> {
        // An export's last request may be under way.
        let _nobody = self.requests.write().unwrap_or_else(PoisonError::into_inner);
        let mut ownership = self.ownership();
        let image = match std::mem::replace(&mut *ownership, Ownership::Closed) {
            // There is no whole image whose bitmaps they would be.
            Ownership::Locked(_image) if self.is_arriving() || !self.is_kept() => {
                self.abandon_arrival();
                return Ok(());
            }
            Ownership::Locked(image) => image,
            // The guest and its bitmaps are elsewhere, and what the sidecar lists is inconsistent, as it should be: the image is out of date.
            Ownership::Frozen(_) => return Ok(()),
            other => {
                *ownership = other;
                return Ok(());
            }
        };
        match (&self.sidecar, self.bitmaps.has_persistent()) {
            (Some(sidecar), any) => {
                if Arc::strong_count(&image) > 1 && any {
                    return Err(DiskError::InUse(self.config.id.clone()));
                }
                self.store(&image, sidecar)
            }
            (None, true) => Err(DiskError::NotStored(self.config.id.clone(), self.refuses_persistent().unwrap_or_default())),
            (None, false) => Ok(()),
        }
    }

    fn store(&self, image: &LockedImage, sidecar: &Sidecar) -> Result<(), DiskError> {
        let Some(stamp) = self.stamp(image)? else { return Ok(()) };
        let contents = Contents { image: stamp, bitmaps: self.bitmaps.stored() };
        sidecar.write(&contents).map_err(|error| self.sidecar_error(error))?;
        // A change by others must have a later time, so the image is kept until the clock has gone on.
        let changed = SystemTime::UNIX_EPOCH + Duration::new(stamp.seconds.max(0) as u64, stamp.nanoseconds.max(0) as u32);
        let age = SystemTime::now().duration_since(changed).unwrap_or_default();
        let tick = if stamp.nanoseconds == 0 { COARSE_TICK } else { CLOCK_TICK };
        if contents.has_bits() {
            std::thread::sleep(tick.saturating_sub(age));
        }
        Ok(())
    }

    fn stamp(&self, image: &LockedImage) -> Result<Option<ImageStamp>, DiskError> {
        let failed = |source| ImageError::Io { action: "flush", path: self.config.path.clone(), source };
        image.stamp().map_err(|error| self.image_error(failed(error)))
    }

    fn sidecar_error(&self, source: SidecarError) -> DiskError {
        DiskError::Sidecar { id: self.config.id.clone(), source }
    }
}

fn listed(bitmap: &StoredBitmap<'_>) -> StoredBitmap<'static> {
    StoredBitmap::listed(&bitmap.name, bitmap.granularity)
}
