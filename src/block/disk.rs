//! A guest's disk: its image, whether this process owns it, and its dirty bitmaps.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use thiserror::Error;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, VolatileSlice};

use super::arriving::Arriving;
use super::dirty_bitmap::DirtyBitmaps;
use super::export_source::{ExportSource, Extent};
use super::image::{Image, ImageError, IncomingError, LockedImage};
use super::io_error::{IoStatus, SharedIoStatus};
use super::sidecar::{Sidecar, SidecarError};
use super::snapshot::Snapshots;
use crate::memory::PAGE_SIZE;
use crate::vm::config::{DiscardMode, DiskConfig};
use incoming::Incoming;

mod incoming;
mod persistence;
mod storage_copy;

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
    /// I/O was asked for on a disk that is being copied to another host.
    #[error("disk {0}: nobody may use it while a migration moves it to another host")]
    Frozen(String),
    /// Something other than the guest was to use a disk that is not all here.
    #[error("disk {0}: it has not wholly arrived from the source yet; try again when the migration has completed")]
    Arriving(String),
    /// There is no image for it to arrive in.
    #[error("disk {id}: {source}")]
    Incoming {
        /// Which disk.
        id: String,
        /// What is wrong.
        source: IncomingError,
    },
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
    /// Before the ownership: its file is removed while that has the lock.
    incoming: Option<Incoming>,
    ownership: Mutex<Ownership>,
    /// Held, shared, by every [`Disk::with_io`] and whatever storage copy reads, and alone while the image is given up.
    requests: RwLock<()>,
    bitmaps: Arc<DirtyBitmaps>,
    /// Where its persistent bitmaps are stored, if they can be.
    sidecar: Option<Sidecar>,
    snapshots: Arc<Snapshots>,
    io_status: SharedIoStatus,
}

#[derive(Debug)]
enum Ownership {
    /// Somebody else may own the image.
    Unlocked(Image),
    Locked(Arc<LockedImage>),
    /// As locked, but only storage copy may read.
    Frozen(Arc<LockedImage>),
    /// Taking over or giving up failed half-way; the image is closed, which ends a lock as well.
    Closed,
}

impl Disk {
    /// Opens the disk's image without locking it.
    pub fn open(config: DiskConfig) -> Result<Arc<Self>, DiskError> {
        let image = Image::open(&config.path, config.readonly, config.options.cache)
            .map_err(|source| DiskError::Image { id: config.id.clone(), source })?;
        let storable = !image.is_block_device() && !image.readonly();
        // Beside the file itself and not beside a link to it; a path that leads nowhere now did so a moment ago.
        let sidecar = storable.then(|| Sidecar::beside(&config.path.canonicalize().unwrap_or_else(|_| config.path.clone())));
        let (size, block_size) = (image.size(), image.block_size());
        Ok(Arc::new(Disk::new(config, size, block_size, Ownership::Unlocked(image), sidecar)))
    }

    fn new(config: DiskConfig, size: u64, block_size: u32, ownership: Ownership, sidecar: Option<Sidecar>) -> Self {
        Disk {
            config,
            size,
            block_size,
            incoming: None,
            ownership: Mutex::new(ownership),
            requests: RwLock::default(),
            bitmaps: DirtyBitmaps::new(size),
            sidecar,
            snapshots: Arc::default(),
            io_status: SharedIoStatus::default(),
        }
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

    /// The disk's snapshots.
    pub fn snapshots(&self) -> &Arc<Snapshots> {
        &self.snapshots
    }

    /// Whether it waits, with a request that failed, for the guest to be resumed.
    pub fn io_status(&self) -> IoStatus {
        self.io_status.get()
    }

    /// The device says how its last request ended, or that it tries again.
    pub fn set_io_status(&self, status: IoStatus) {
        self.io_status.set(status);
    }

    /// Locks the image, or says who has it. Nothing of it that this host cached before is used afterwards. Does nothing if it is locked
    /// already. Stored bitmaps are not brought back: the guest's come with it.
    pub fn acquire(&self) -> Result<(), DiskError> {
        self.lock_image(&mut self.ownership()).map(drop)
    }

    /// False if it is locked already.
    fn lock_image(&self, ownership: &mut Ownership) -> Result<bool, DiskError> {
        let image = match std::mem::replace(ownership, Ownership::Closed) {
            Ownership::Unlocked(image) => image,
            locked @ (Ownership::Locked(_) | Ownership::Frozen(_)) => {
                *ownership = locked;
                return Ok(false);
            }
            Ownership::Closed => Image::open(&self.config.path, self.config.readonly, self.config.options.cache)
                .map_err(|source| self.image_error(source))?,
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

    /// Makes everything written durable and gives the lock up. Waits for those in [`Disk::with_io`], and refuses them afterwards; the disk's
    /// snapshots are to be [broken](Snapshots::break_all) before others write. Fails, and keeps the lock, while another [`DiskIo`] exists.
    pub fn release(&self) -> Result<(), DiskError> {
        if !self.is_kept() {
            // There is nobody to give it up to, and it would be taken for one that was left behind.
            return Ok(());
        }
        let _nobody = self.requests.write().unwrap_or_else(PoisonError::into_inner);
        let mut ownership = self.ownership();
        let locked = match std::mem::replace(&mut *ownership, Ownership::Closed) {
            // Of a frozen one nobody has an I/O.
            Ownership::Locked(locked) | Ownership::Frozen(locked) => locked,
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
        Ok(DiskIo {
            image: self.usable(&self.ownership())?.clone(),
            bitmaps: self.bitmaps.clone(),
            snapshots: self.snapshots.clone(),
            arriving: self.arriving().cloned(),
            discard: self.config.options.discard,
        })
    }

    /// Carries out one request of somebody other than the guest's device. It should be short, because giving the image up waits for it,
    /// and must not make another one. `ESHUTDOWN` where the disk is not [available](Disk::check_available).
    pub fn with_io<R>(&self, request: impl FnOnce(&DiskIo) -> io::Result<R>) -> io::Result<R> {
        let _in_flight = self.requests.read().unwrap_or_else(PoisonError::into_inner);
        let io = self.check_available().and_then(|()| self.io());
        request(&io.map_err(|_| io::Error::from_raw_os_error(libc::ESHUTDOWN))?)
    }

    /// Whether others than the guest can use the disk: its image is this process's, and all of it has arrived.
    pub fn check_available(&self) -> Result<(), DiskError> {
        if self.is_arriving() {
            return Err(DiskError::Arriving(self.config.id.clone()));
        }
        self.usable(&self.ownership()).map(drop)
    }

    fn usable<'a>(&self, ownership: &'a Ownership) -> Result<&'a Arc<LockedImage>, DiskError> {
        match ownership {
            Ownership::Locked(image) => Ok(image),
            Ownership::Frozen(_) => Err(DiskError::Frozen(self.config.id.clone())),
            Ownership::Unlocked(_) | Ownership::Closed => Err(DiskError::NotOwned(self.config.id.clone())),
        }
    }

    fn ownership(&self) -> MutexGuard<'_, Ownership> {
        self.ownership.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn image_error(&self, source: ImageError) -> DiskError {
        DiskError::Image { id: self.config.id.clone(), source }
    }
}

/// The disk as it is now.
impl ExportSource for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn read_at(&self, target: &mut [u8], offset: u64) -> io::Result<()> {
        self.with_io(|io| io.read(&[VolatileSlice::from(target)], offset))
    }

    fn allocation(&self, offset: u64, length: u64) -> io::Result<Extent> {
        self.with_io(|io| io.image.allocation(offset, length))
    }
}

/// I/O on a disk whose image is locked. Every change of content is in the disk's bitmaps when the call returns, also if it failed, because
/// a part of it may have happened. No operation on the bitmaps falls between a change and its mark. Offsets and lengths are in bytes.
#[derive(Clone, Debug)]
pub struct DiskIo {
    image: Arc<LockedImage>,
    bitmaps: Arc<DirtyBitmaps>,
    snapshots: Arc<Snapshots>,
    /// Of a disk that came, or comes, with a migration.
    arriving: Option<Arc<Arriving>>,
    discard: DiscardMode,
}

impl DiskIo {
    /// Reads into guest memory; see [`LockedImage::read_vectored_at`].
    pub fn read<B: BitmapSlice>(&self, target: &[VolatileSlice<B>], offset: u64) -> io::Result<()> {
        if let Some(arriving) = &self.arriving {
            arriving.before_read(offset..offset.saturating_add(length_of(target)))?;
        }
        self.image.read_vectored_at(target, offset)
    }

    /// What takes space; see [`LockedImage::allocation`].
    pub fn allocation(&self, offset: u64, length: u64) -> io::Result<Extent> {
        self.image.allocation(offset, length)
    }

    /// Writes from guest memory.
    pub fn write<B: BitmapSlice>(&self, source: &[VolatileSlice<B>], offset: u64) -> io::Result<()> {
        let length = length_of(source);
        // A page that is missing in a postcopy is waited for here and not with the bitmaps held, for which the rest of the migration waits.
        source.iter().for_each(touch);
        self.changed(offset, length, || self.image.write_vectored_at(source, offset))
    }

    /// Discards, unless the disk ignores that or there is a snapshot, for which all of it would have to be copied first; see
    /// [`LockedImage::discard`].
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.discard == DiscardMode::Ignore || self.snapshots.exist() {
            return Ok(());
        }
        self.changed(offset, length, || self.image.discard(offset, length))
    }

    /// Writes zeros; see [`LockedImage::write_zeroes`].
    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let unmap = unmap && self.discard == DiscardMode::Unmap;
        self.changed(offset, length, || self.image.write_zeroes(offset, length, unmap))
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn changed(&self, offset: u64, length: u64, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // What has to come from another host is waited for before anything is locked.
        let arriving = self.arriving.as_ref().map(|arriving| arriving.before_write(offset..offset.saturating_add(length)));
        let claim = arriving.transpose()?.flatten();
        // First: no snapshot is taken between what is copied for the present ones and the change.
        let recording = self.bitmaps.recording();
        self.snapshots.before_change(&self.image, offset, length);
        let done = change();
        // After the change, before anybody is told of it: see the module of the bitmaps.
        recording.mark(offset, length);
        if let Some(claim) = claim.filter(|_| done.is_ok()) {
            claim.settle();
        }
        done
    }
}

fn length_of<B: BitmapSlice>(slices: &[VolatileSlice<B>]) -> u64 {
    slices.iter().fold(0, |sum, slice| sum.saturating_add(slice.len() as u64))
}

/// Reads a byte of each page.
fn touch<B: BitmapSlice>(slice: &VolatileSlice<B>) {
    let offsets = (0..slice.len()).step_by(PAGE_SIZE).chain(slice.len().checked_sub(1));
    for offset in offsets {
        // Within the slice.
        let _ = slice.load::<u8>(offset, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
