//! A guest's disk: its image, whether this process owns it, and its dirty bitmaps.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::dirty_bitmap::DirtyBitmaps;
use super::image::{Image, ImageError, LockedImage};
use super::sidecar::{Sidecar, SidecarError};
use crate::vm::config::DiskConfig;

mod persistence;

/// Why a disk cannot change hands.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The image says no.
    #[error("disk {id}: {source}")]
    Image {
        /// Which disk.
        id: String,
        /// What is wrong.
        source: ImageError,
    },
    /// I/O was asked for on a disk whose image is not locked.
    #[error("disk {0}: its image is not locked by this process")]
    NotOwned(String),
    /// The image was to be given up while something can still do I/O on it.
    #[error("disk {0}: its image is still in use by a device that is not paused")]
    InUse(String),
    /// The file of its persistent bitmaps says no.
    #[error("disk {id}: {source}; persistent dirty bitmaps are kept beside the image, so its directory must be writable")]
    Sidecar {
        /// Which disk.
        id: String,
        /// What is wrong.
        source: SidecarError,
    },
    /// Persistent bitmaps have come with a guest, and there is no place for them here.
    #[error("disk {0}: its dirty bitmaps are not stored: {1}")]
    NotStored(String, &'static str),
}

/// A disk, shared by the virtio-blk device, QMP and migration.
#[derive(Debug)]
pub struct Disk {
    config: DiskConfig,
    size: u64,
    block_size: u32,
    ownership: Mutex<Ownership>,
    bitmaps: Arc<DirtyBitmaps>,
    /// Where its persistent bitmaps are stored, if they can be.
    sidecar: Option<Sidecar>,
}

#[derive(Debug)]
enum Ownership {
    /// Somebody else may own the image.
    Unlocked(Image),
    Locked(Arc<LockedImage>),
    /// Taking over or giving up failed half-way; the image is closed, which ends a lock as well.
    Closed,
}

impl Disk {
    /// Opens the disk's image without locking it.
    pub fn open(config: DiskConfig) -> Result<Arc<Self>, DiskError> {
        let image = Image::open(&config.path, config.readonly).map_err(|source| DiskError::Image { id: config.id.clone(), source })?;
        let bitmaps = DirtyBitmaps::new(image.size());
        let (size, block_size) = (image.size(), image.block_size());
        let storable = !image.is_block_device() && !image.readonly();
        // Beside the file itself and not beside a link to it; a path that leads nowhere now did so a moment ago.
        let sidecar = storable.then(|| Sidecar::beside(&config.path.canonicalize().unwrap_or_else(|_| config.path.clone())));
        Ok(Arc::new(Disk { config, size, block_size, ownership: Mutex::new(Ownership::Unlocked(image)), bitmaps, sidecar }))
    }

    /// What the disk was made from.
    pub fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// Size in bytes, a positive multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Logical block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// The disk's dirty bitmaps.
    pub fn bitmaps(&self) -> &Arc<DirtyBitmaps> {
        &self.bitmaps
    }

    /// Locks the image, or says who has it. Nothing of it that this host cached before is used afterwards. Does nothing if it is locked
    /// already. Stored bitmaps are not brought back: the guest's come with it.
    pub fn acquire(&self) -> Result<(), DiskError> {
        let mut ownership = self.ownership();
        if self.lock_image(&mut ownership)? {
            self.revoke_stored().inspect_err(|_| *ownership = Ownership::Closed)?;
        }
        Ok(())
    }

    /// False if it is locked already.
    fn lock_image(&self, ownership: &mut Ownership) -> Result<bool, DiskError> {
        let image = match std::mem::replace(ownership, Ownership::Closed) {
            Ownership::Unlocked(image) => image,
            locked @ Ownership::Locked(_) => {
                *ownership = locked;
                return Ok(false);
            }
            Ownership::Closed => Image::open(&self.config.path, self.config.readonly).map_err(|source| self.image_error(source))?,
        };
        match image.lock() {
            Ok(locked) => {
                if let Err(source) = locked.invalidate_cache() {
                    // Dropping the image gives the lock up: nobody may read what is cached.
                    return Err(self.image_error(source));
                }
                *ownership = Ownership::Locked(Arc::new(locked));
                Ok(true)
            }
            Err(refused) => {
                *ownership = Ownership::Unlocked(refused.image);
                Err(self.image_error(refused.error))
            }
        }
    }

    /// Makes everything written durable and gives the lock up. Fails, and keeps the lock, while a [`DiskIo`] exists.
    pub fn release(&self) -> Result<(), DiskError> {
        let mut ownership = self.ownership();
        let locked = match std::mem::replace(&mut *ownership, Ownership::Closed) {
            Ownership::Locked(locked) => locked,
            other => {
                *ownership = other;
                return Ok(());
            }
        };
        let locked = Arc::try_unwrap(locked).map_err(|shared| {
            *ownership = Ownership::Locked(shared);
            DiskError::InUse(self.config.id.clone())
        })?;
        if let Err(source) = locked.flush() {
            let path = self.config.path.clone();
            *ownership = Ownership::Locked(Arc::new(locked));
            return Err(self.image_error(ImageError::Io { action: "flush", path, source }));
        }
        *ownership = Ownership::Unlocked(locked.unlock().map_err(|source| self.image_error(source))?);
        Ok(())
    }

    /// Access to the disk's content, for as long as the value lives.
    pub fn io(&self) -> Result<DiskIo, DiskError> {
        match &*self.ownership() {
            Ownership::Locked(image) => Ok(DiskIo { image: image.clone(), bitmaps: self.bitmaps.clone() }),
            _ => Err(DiskError::NotOwned(self.config.id.clone())),
        }
    }

    fn ownership(&self) -> MutexGuard<'_, Ownership> {
        self.ownership.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn image_error(&self, source: ImageError) -> DiskError {
        DiskError::Image { id: self.config.id.clone(), source }
    }
}

/// I/O on a disk whose image is locked. Every change of content is in the disk's bitmaps when the call returns, also if it failed, because
/// a part of it may have happened. No operation on the bitmaps falls between a change and its mark. Offsets and lengths are in bytes.
#[derive(Clone, Debug)]
pub struct DiskIo {
    image: Arc<LockedImage>,
    bitmaps: Arc<DirtyBitmaps>,
}

impl DiskIo {
    /// Reads into guest memory; see [`LockedImage::read_vectored_at`].
    pub fn read<B: BitmapSlice>(&self, target: &[VolatileSlice<B>], offset: u64) -> io::Result<()> {
        self.image.read_vectored_at(target, offset)
    }

    /// Writes from guest memory.
    pub fn write<B: BitmapSlice>(&self, source: &[VolatileSlice<B>], offset: u64) -> io::Result<()> {
        let length = source.iter().fold(0u64, |sum, slice| sum.saturating_add(slice.len() as u64));
        self.recorded(offset, length, || self.image.write_vectored_at(source, offset))
    }

    /// Discards; see [`LockedImage::discard`].
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.recorded(offset, length, || self.image.discard(offset, length))
    }

    /// Writes zeros; see [`LockedImage::write_zeroes`].
    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.recorded(offset, length, || self.image.write_zeroes(offset, length, unmap))
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn recorded(&self, offset: u64, length: u64, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let recording = self.bitmaps.recording();
        let done = change();
        // After the change, before anybody is told of it: see the module of the bitmaps.
        recording.mark(offset, length);
        done
    }
}

#[cfg(test)]
mod tests;
