//! A new file that has its name only when it is whole, and takes no space for zeros.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

/// The unit in which zeros are left out, and in which full backups are fingerprinted, in bytes.
pub const CLUSTER: u64 = 64 << 10;

/// A file under a temporary name, `PATH.new`, which is gone when the value is dropped without [`NewFile::keep`].
#[derive(Debug)]
pub struct NewFile {
    file: File,
    path: PathBuf,
    temporary: PathBuf,
    kept: bool,
}

impl NewFile {
    /// Begins the file at `path`, for its owner only. An error where there is one already, unless it may be `replaced`, or where another
    /// process is writing it.
    pub fn create(path: &Path, replaced: bool) -> io::Result<Self> {
        if !replaced && path.symlink_metadata().is_ok() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it exists; choose another name, or replace it with --force"));
        }
        let mut temporary = OsString::from(path);
        temporary.push(".new");
        let temporary = PathBuf::from(temporary);
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temporary);
        let file = opened?;
        let busy = || io::Error::other("somebody else is writing it");
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| busy())?;
        // It may have got its name, or have gone, between the two.
        if temporary.symlink_metadata().map_err(|_| busy())?.ino() != file.metadata()?.ino() {
            return Err(busy());
        }
        // One that was killed has left it, or somebody else was here first: then this fails.
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.set_len(0)?;
        Ok(NewFile { file, path: path.to_owned(), temporary, kept: false })
    }

    /// The file, to be written at its end.
    pub fn stream(&self) -> &File {
        &self.file
    }

    /// Makes it `size` zeros.
    pub fn set_size(&self, size: u64) -> io::Result<()> {
        self.file.set_len(size)
    }

    /// Writes `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Makes zeros of a range, without space where the file system can do that.
    pub fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        if fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length).is_ok() {
            return Ok(());
        }
        let zeros = vec![0; CLUSTER as usize];
        let (mut at, end) = (offset, offset.saturating_add(length));
        while at < end {
            let piece = zeros.get(..(end - at).min(CLUSTER) as usize).unwrap_or(&zeros);
            self.write_at(piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Gives the file its name, durably: it is whole. Returns the bytes of storage that it takes.
    pub fn keep(mut self) -> io::Result<u64> {
        (&self.file).flush()?;
        // Before it has the name: a crash must not leave the name on half a file.
        self.file.sync_all()?;
        let stored = self.file.metadata()?.blocks() * 512;
        fs::rename(&self.temporary, &self.path)?;
        self.kept = true;
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory)?.sync_all()?;
        Ok(stored)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.kept {
            // Nobody takes it for the file.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// The clusters of `bytes`, which begin at the multiple `offset` of [`CLUSTER`], that are not all zeros, with their offsets.
pub fn clusters_with_data(bytes: &[u8], offset: u64) -> impl Iterator<Item = (u64, &[u8])> {
    let clusters = (0u64..).map(move |number| offset + number * CLUSTER).zip(bytes.chunks(CLUSTER as usize));
    clusters.filter(|(_, cluster)| !is_zero(cluster))
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // In words, for which the compiler has vector instructions.
    let (head, words, tail) = (bytes.len() % 8, bytes.chunks_exact(8), bytes);
    let rest = tail.get(bytes.len() - head..).unwrap_or_default();
    rest.iter().all(|byte| *byte == 0) && words.fold(0, |all, word| all | word.iter().fold(0, |any, byte| any | byte)) == 0
}
