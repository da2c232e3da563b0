//! Snapshots: frozen points in time of a disk, for readers outside the guest, while the guest goes on writing.
//!
//! While a snapshot exists, whoever changes the disk first copies the old contents of the clusters concerned to a temporary file. What cannot be
//! copied breaks the snapshot, never the change; so does giving the image up, because what is in it is then somebody else's to write.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use thiserror::Error;
use vm_memory::VolatileSlice;

use super::dirty_bitmap::HeldBitmaps;
use super::disk::{Disk, DiskError};
use super::export_source::{ExportSource, Extent};
use super::image::LockedImage;
use store::{Place, Store};

mod store;
mod temporary;

/// Why there is no such snapshot.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// Not a usable name.
    #[error("a snapshot's name has 1 to {MAX_NAME} letters, digits, '-', '_' or '.', unlike '{0}'")]
    Name(String),
    /// The name is taken.
    #[error("the name '{0}' is taken by a disk or another snapshot")]
    Exists(String),
    /// The disk has none of this name.
    #[error("disk {disk} has no snapshot '{name}'")]
    NotFound {
        /// The disk.
        disk: String,
        /// The name.
        name: String,
    },
    /// Which parts of the disk are kept would take too much memory.
    #[error("disk {0} is larger than 128 TiB, the most that a snapshot can keep account of")]
    TooLarge(String),
    /// The disk is not, or not wholly, this process's.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// No temporary file.
    #[error("cannot create a temporary file for a snapshot in {directory}: {source}; TMPDIR names another place")]
    Temporary {
        /// Where it was to be.
        directory: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Largest disk in bytes: 128 TiB, for which a snapshot takes 256 MiB of memory.
const MAX_SIZE: u64 = 128 << 40;
/// How far extents of what was kept reach at most, in bytes. Whoever asks for one after the other does not have all of the rest looked at each time.
const MAX_KEPT_EXTENT: u64 = 64 << 20;
/// Longest name of a snapshot in bytes: that of QEMU's node names.
pub const MAX_NAME: usize = 31;

/// The snapshots of one disk.
#[derive(Debug, Default)]
pub struct Snapshots {
    /// Stores that exist, so that a change of a disk without a snapshot costs a look at this and no more.
    count: Arc<AtomicUsize>,
    list: RwLock<Vec<Listed>>,
}

#[derive(Debug)]
struct Listed {
    /// There is something to keep for as long as somebody can read it.
    store: Weak<Store>,
    /// Nothing once it was removed.
    named: Option<Arc<Store>>,
}

impl Snapshots {
    /// The names, oldest snapshot first.
    pub fn names(&self) -> Vec<String> {
        self.read().iter().filter_map(|listed| listed.named.as_ref()).map(|store| store.name.clone()).collect()
    }

    /// Removes the name. What was kept is freed when nobody reads the snapshot any more; false if there is no such name.
    pub fn remove(&self, name: &str) -> bool {
        let mut list = self.write();
        let found = list.iter_mut().find_map(|listed| listed.named.take_if(|store| store.name == name));
        drop(list);
        // Not with the lock held, for which the guest waits: to free a large file takes its time.
        found.is_some()
    }

    /// To be called before anything changes `length` bytes of the image from `offset` on, with
    /// [`DirtyBitmaps::recording`](super::dirty_bitmap::DirtyBitmaps::recording) held until after the change.
    pub(super) fn before_change(&self, image: &LockedImage, offset: u64, length: u64) {
        // What is installed is seen here, because nobody installs while changes go on.
        if !self.exist() {
            return;
        }
        let size = image.image().size();
        let range = offset.min(size)..offset.saturating_add(length).min(size);
        if !range.is_empty() {
            self.stores().iter().for_each(|store| store.before_change(image, &range));
        }
    }

    /// Whether there are any.
    pub(super) fn exist(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }

    /// Ends them all for their readers: somebody else is about to write to the image.
    pub fn break_all(&self, reason: &str) {
        self.stores().iter().for_each(|store| store.break_because(reason.to_owned()));
    }

    fn stores(&self) -> Vec<Arc<Store>> {
        self.read().iter().filter_map(|listed| listed.store.upgrade()).collect()
    }

    fn named(&self, name: &str) -> Option<Arc<Store>> {
        self.read().iter().filter_map(|listed| listed.named.as_ref()).find(|store| store.name == name).cloned()
    }

    fn install(&self, store: &Arc<Store>) {
        let mut list = self.write();
        list.retain(|listed| listed.store.strong_count() > 0);
        list.push(Listed { store: Arc::downgrade(store), named: Some(store.clone()) });
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<Listed>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<Listed>> {
        self.list.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A snapshot that will be of the moment at which it is installed, and then cannot fail any more; dropped, it never was.
#[derive(Debug)]
pub struct PreparedSnapshot {
    disk: Arc<Disk>,
    store: Arc<Store>,
}

impl PreparedSnapshot {
    /// Makes ready all that can fail. `name` must be nobody else's until it is installed, among all disks and snapshots.
    pub fn new(disk: &Arc<Disk>, name: &str) -> Result<Self, SnapshotError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !(1..=MAX_NAME).contains(&name.len()) || !name.bytes().all(allowed) {
            return Err(SnapshotError::Name(name.to_owned()));
        }
        if disk.size() > MAX_SIZE {
            return Err(SnapshotError::TooLarge(disk.config().id.clone()));
        }
        // Of a guest that is not here, not wholly here, or no longer here, there is no such moment.
        disk.check_available()?;
        let directory = temporary::directory();
        let file = temporary::create(&directory).map_err(|source| SnapshotError::Temporary { directory, source })?;
        Ok(Self::with_file(disk, name, file))
    }

    fn with_file(disk: &Arc<Disk>, name: &str, file: std::fs::File) -> Self {
        let store = Store::new(name.to_owned(), disk.size(), file, disk.snapshots().count.clone());
        PreparedSnapshot { disk: disk.clone(), store: Arc::new(store) }
    }

    /// Now is the moment: `_held` are the disk's bitmaps, and while they are held nothing changes the disk.
    pub fn install(self, _held: &HeldBitmaps<'_>) -> Snapshot {
        self.disk.snapshots().install(&self.store);
        Snapshot { disk: self.disk, store: self.store }
    }
}

/// A frozen point in time of a disk. It can be read for as long as this value lives and the snapshot is not broken.
#[derive(Clone, Debug)]
pub struct Snapshot {
    disk: Arc<Disk>,
    store: Arc<Store>,
}

impl Snapshot {
    /// The snapshot `name` of `disk`.
    pub fn find(disk: &Arc<Disk>, name: &str) -> Option<Self> {
        Some(Snapshot { disk: disk.clone(), store: disk.snapshots().named(name)? })
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Why it cannot be read any more, if so.
    pub fn broken(&self) -> Option<&str> {
        self.store.broken()
    }

    fn check_not_broken(&self) -> io::Result<()> {
        match self.store.broken() {
            None => Ok(()),
            Some(reason) => Err(io::Error::other(format!("snapshot '{}' is broken: {reason}", self.store.name))),
        }
    }

    fn check_range(&self, offset: u64, length: u64) -> io::Result<Range<u64>> {
        match offset.checked_add(length) {
            Some(end) if end <= self.disk.size() => Ok(offset..end),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "the range reaches beyond the end of the snapshot")),
        }
    }
}

impl ExportSource for Snapshot {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn block_size(&self) -> u32 {
        self.disk.block_size()
    }

    fn read_at(&self, target: &mut [u8], offset: u64) -> io::Result<()> {
        let mut range = self.check_range(offset, target.len() as u64)?;
        let mut rest = target;
        while !range.is_empty() {
            self.check_not_broken()?;
            let (place, end) = self.store.place(&range);
            let wanted = rest.get_mut(..(end - range.start) as usize).ok_or(io::ErrorKind::InvalidInput)?;
            let done = match place {
                Place::Store => self.store.read_at(wanted, range.start).map(|()| end - range.start)?,
                Place::Image => {
                    self.disk.with_io(|io| io.read(&[VolatileSlice::from(&mut *wanted)], range.start))?;
                    // What changed meanwhile is read again, from the store.
                    self.store.unchanged(&(range.start..end))
                }
            };
            rest = rest.get_mut(done as usize..).unwrap_or_default();
            range.start += done;
        }
        // Last: what is not kept any more may have been read.
        self.check_not_broken()
    }

    fn allocation(&self, offset: u64, length: u64) -> io::Result<Extent> {
        let range = self.check_range(offset, length)?;
        if range.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        loop {
            let (place, end) = self.store.place(&(range.start..range.end.min(range.start + MAX_KEPT_EXTENT)));
            let extent = match place {
                Place::Store => self.store.allocation(&(range.start..end)),
                Place::Image => {
                    let extent = self.disk.with_io(|io| io.allocation(range.start, length))?;
                    Extent { length: self.store.unchanged(&(range.start..range.start + extent.length)), ..extent }
                }
            };
            self.check_not_broken()?;
            if extent.length > 0 {
                return Ok(extent);
            }
        }
    }
}

#[cfg(test)]
mod tests;
