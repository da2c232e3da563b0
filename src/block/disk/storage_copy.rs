//! What storage copy does with a disk that moves to another host.

use std::io;
use std::sync::{Arc, PoisonError};

use super::{Disk, DiskError, Ownership};
use crate::block::block_run::{BlockRun, COPY_BLOCK};
use crate::block::dirty_bitmap::ChangeTracking;
use crate::block::export_source::ExtentKind;
use crate::block::image::LockedImage;

impl Disk {
    /// Records from now on which blocks change.
    pub fn track_changes(&self) -> ChangeTracking {
        self.bitmaps.track_changes()
    }

    /// Visits the blocks that may hold something other than zeros, in ascending runs that do not touch. Of blocks that change meanwhile it
    /// may say either.
    pub fn allocated(&self, mut visit: impl FnMut(BlockRun)) -> io::Result<()> {
        let mut found = BlockRun::new(0, 0);
        let mut at = 0;
        while at < self.size {
            let extent = self.copying(|image| image.allocation(at, self.size - at))?;
            let end = at + extent.length;
            if extent.kind == ExtentKind::Data {
                let touched = BlockRun::touched_by(&(at..end));
                if touched.first > found.end() {
                    visit(found);
                    found = touched;
                }
                found = BlockRun::between(found.first, touched.end());
            }
            at = end;
        }
        if found.count > 0 {
            visit(found);
        }
        Ok(())
    }

    /// Reads blocks for storage copy, also of a frozen disk: as many as `target` is long, which is a multiple of [`COPY_BLOCK`]. What is
    /// beyond the disk's end reads as zeros.
    pub fn read_blocks(&self, first: u64, target: &mut [u8]) -> io::Result<()> {
        let bytes = BlockRun::new(first, (target.len() as u64).div_ceil(COPY_BLOCK)).bytes(self.size);
        let length = target.len().min((bytes.end - bytes.start) as usize);
        let (content, beyond) = target.split_at_mut(length);
        beyond.fill(0);
        self.copying(|image| image.read_at(content, bytes.start))
    }

    /// Keeps everybody from the disk but storage copy, which reads it, and keeps the lock. Waits for those in [`Disk::with_io`]. Fails while
    /// another [`DiskIo`](super::DiskIo) exists. Does nothing if it is frozen already.
    pub fn freeze(&self) -> Result<(), DiskError> {
        let _nobody = self.requests.write().unwrap_or_else(PoisonError::into_inner);
        let mut ownership = self.ownership();
        if matches!(&*ownership, Ownership::Frozen(_)) {
            return Ok(());
        }
        if self.is_arriving() {
            return Err(DiskError::Arriving(self.config.id.clone()));
        }
        let image = self.usable(&ownership)?.clone();
        // The disk's, and this one.
        if Arc::strong_count(&image) > 2 {
            return Err(DiskError::InUse(self.config.id.clone()));
        }
        *ownership = Ownership::Frozen(image);
        Ok(())
    }

    /// Lets the guest and others use a frozen disk again.
    pub fn thaw(&self) {
        let mut ownership = self.ownership();
        if let Ownership::Frozen(image) = &*ownership {
            let image = image.clone();
            *ownership = Ownership::Locked(image);
        }
    }

    /// Reads from the image without the ownership held, while it cannot be given up.
    pub(super) fn copying<R>(&self, read: impl FnOnce(&LockedImage) -> io::Result<R>) -> io::Result<R> {
        let _in_flight = self.requests.read().unwrap_or_else(PoisonError::into_inner);
        let image = match &*self.ownership() {
            Ownership::Locked(image) | Ownership::Frozen(image) => image.clone(),
            Ownership::Unlocked(_) | Ownership::Closed => return Err(io::Error::from_raw_os_error(libc::ESHUTDOWN)),
        };
        read(&image)
    }
}

#[cfg(test)]
mod tests;
