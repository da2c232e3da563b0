//! A disk that comes with a migration: its image is made here.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Disk, DiskError, Ownership};
use crate::block::arriving::Arriving;
use crate::block::image::{ImageError, IncomingFile};
use crate::block::sidecar::Sidecar;
use crate::vm::config::DiskConfig;

#[derive(Debug)]
pub(super) struct Incoming {
    file: Mutex<IncomingFile>,
    arriving: Arc<Arriving>,
}

impl Incoming {
    fn lock_file(&self) -> MutexGuard<'_, IncomingFile> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk {
    /// Makes the image of a disk of `size` bytes that a migration brings, locked and, until [`Disk::keep`], as `PATH.incoming`: a disk that is
    /// dropped before [`Disk::commit_arrival`] takes it along. `config` is not read-only.
    pub fn create(config: DiskConfig, size: u64) -> Result<Arc<Self>, DiskError> {
        let created = IncomingFile::create(&config.path, size, config.options.cache);
        let (file, image) = created.map_err(|source| DiskError::Incoming { id: config.id.clone(), source })?;
        let image = Arc::new(image);
        let arriving = Arriving::new(size, &image);
        let sidecar = Sidecar::beside(&config.path);
        let block_size = image.image().block_size();
        let mut disk = Disk::new(config, size, block_size, Ownership::Locked(image), Some(sidecar));
        disk.incoming = Some(Incoming { file: Mutex::new(file), arriving });
        Ok(Arc::new(disk))
    }

    /// The guest is this host's and about to write: the image stays, whatever happens. Does nothing on a disk that was here before.
    pub fn commit_arrival(&self) {
        if let Some(incoming) = &self.incoming {
            incoming.lock_file().commit();
        }
    }

    /// All of it has arrived: makes that durable and gives the image its own name, never over something that is there. Before the source is told
    /// that it may forget its image. Does nothing the second time, or on a disk that was here before.
    pub fn keep(&self) -> Result<(), DiskError> {
        let Some(incoming) = self.incoming.as_ref().filter(|incoming| !incoming.lock_file().is_kept()) else { return Ok(()) };
        let path = || self.config.path.clone();
        let flushed = self.copying(|image| image.flush());
        flushed.map_err(|source| self.image_error(ImageError::Io { action: "flush", path: path(), source }))?;
        // Before the name: what has it is whole, also after a crash.
        incoming.lock_file().keep().map_err(|source| DiskError::Incoming { id: self.config.id.clone(), source })
    }

    /// Which blocks are there, of a disk that came, or comes, with a migration.
    pub fn arriving(&self) -> Option<&Arc<Arriving>> {
        self.incoming.as_ref().map(|incoming| &incoming.arriving)
    }

    /// Where its image is, if a guest has written there and not all of it is known to be here.
    pub fn incomplete_image(&self) -> Option<PathBuf> {
        self.incoming.as_ref().and_then(|incoming| incoming.lock_file().incomplete().map(Path::to_path_buf))
    }

    /// Whether the image has its name, or was here before.
    pub(super) fn is_kept(&self) -> bool {
        self.incoming.as_ref().is_none_or(|incoming| incoming.lock_file().is_kept())
    }

    /// Whether blocks of it are missing.
    pub(super) fn is_arriving(&self) -> bool {
        self.arriving().is_some_and(|arriving| !arriving.is_complete())
    }

    /// Nothing comes of the migration: the image goes, unless the guest may have written there. Then it stays, and the guest, which is about to
    /// end with its process, waits on for what has not come.
    pub fn abandon_arrival(&self) {
        if let Some(incoming) = &self.incoming
            && incoming.lock_file().remove_unless_committed()
        {
            incoming.arriving.abandon("the migration has ended");
        }
    }
}
