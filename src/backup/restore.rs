//! A full backup and the incremental ones after it, made an image again.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use thiserror::Error;

use super::id::{BackupId, Fingerprint};
use super::incremental::{Change, FormatError, Header, Reader};
use super::sparse::{CLUSTER, NewFile, clusters_with_data};

/// What is read at once, in bytes.
const PIECE: u64 = 1 << 20;

/// Why nothing was restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The image cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not an incremental backup, or damaged.
    #[error("cannot restore from {}: {source}", path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// The first file is not a full backup.
    #[error("{} is an incremental backup; the first file is the full one that the chain begins with", .0.display())]
    NotFull(PathBuf),
    /// The backups are of disks of different sizes.
    #[error("{} is of a disk of {found} bytes, and {} of one of {expected}: they are not of one disk", path.display(), before.display())]
    Size {
        /// The incremental backup.
        path: PathBuf,
        /// Its disk's size in bytes.
        found: u64,
        /// The backup before it.
        before: PathBuf,
        /// The size of its disk.
        expected: u64,
    },
    /// Two backups do not follow each other.
    #[error(
        "{} was not made after {}: backups between them are missing, in the wrong order, or the earlier one was changed since",
        path.display(), before.display()
    )]
    Order {
        /// The incremental backup.
        path: PathBuf,
        /// The one given before it.
        before: PathBuf,
    },
    /// An incremental backup has all that the one before it has.
    #[error("{} follows the same backup as {}, and has all that it has: leave {} out", path.display(), before.display(), before.display())]
    Needless {
        /// The later one.
        path: PathBuf,
        /// The one that is not needed.
        before: PathBuf,
    },
    /// The person no longer wants it.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

/// How large it is and how much came of where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Size of the image in bytes.
    pub size: u64,
    /// Bytes of storage that it takes.
    pub stored: u64,
}

/// A chain that is known to be in order, as far as that can be known without reading the full backup.
pub struct Chain<'a> {
    full: (&'a Path, File, u64),
    incrementals: Vec<(&'a Path, Reader<BufReader<File>>)>,
}

fn open(path: &Path) -> Result<(File, u64), RestoreError> {
    let read = |source| RestoreError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(read)?;
    let metadata = file.metadata().map_err(read)?;
    if !metadata.is_file() {
        return Err(read(io::Error::other("it is no file")));
    }
    Ok((file, metadata.len()))
}

impl<'a> Chain<'a> {
    /// Opens the backups and checks that they follow each other.
    pub fn open(full: &'a Path, incrementals: &'a [PathBuf]) -> Result<Self, RestoreError> {
        let (file, size) = open(full)?;
        if Reader::new(&file).is_ok() {
            return Err(RestoreError::NotFull(full.to_owned()));
        }
        let mut chain = Chain { full: (full, file, size), incrementals: Vec::new() };
        for path in incrementals {
            let reader = Reader::new(BufReader::new(open(path)?.0));
            let reader = reader.map_err(|source| RestoreError::Format { path: path.clone(), source })?;
            let header = reader.header();
            if header.size != size {
                return Err(RestoreError::Size { path: path.clone(), found: header.size, before: full.to_owned(), expected: size });
            }
            if let Some((before, last)) = chain.incrementals.last() {
                check_order(path, header, before, last.header())?;
            }
            chain.incrementals.push((path, reader));
        }
        Ok(chain)
    }

    /// Writes the image at `to`; `progress` is told where it is, of how many bytes, and says whether to go on. Where this fails, there is
    /// nothing new at `to`.
    pub fn restore(self, to: &Path, replaced: bool, mut progress: impl FnMut(u64, u64) -> bool) -> Result<Restored, RestoreError> {
        let write = |source| RestoreError::Write { path: to.to_owned(), source };
        let (full, source, size) = self.full;
        let image = NewFile::create(to, replaced).map_err(write)?;
        image.set_size(size).map_err(write)?;
        let total = size.saturating_mul(1 + self.incrementals.len() as u64);
        let id = copy(&source, full, size, |bytes, offset| image.write_at(bytes, offset).map_err(write), |at| progress(at, total))?;
        if let Some((path, first)) = self.incrementals.first()
            && !first.header().parents.contains(&id)
        {
            return Err(RestoreError::Order { path: path.to_path_buf(), before: full.to_owned() });
        }
        for (done, (path, mut reader)) in (1u64..).zip(self.incrementals) {
            let format = |source| RestoreError::Format { path: path.to_owned(), source };
            while let Some((offset, change)) = reader.next_change().map_err(format)? {
                let written = match change {
                    Change::Data(bytes) => image.write_at(bytes, offset),
                    Change::Zeros(length) => image.zero(offset, length),
                };
                written.map_err(write)?;
                if !progress(done.saturating_mul(size).saturating_add(offset), total) {
                    return Err(RestoreError::Interrupted);
                }
            }
        }
        let stored = image.keep().map_err(write)?;
        Ok(Restored { size, stored })
    }
}

fn check_order(path: &Path, header: &Header, before: &Path, last: &Header) -> Result<(), RestoreError> {
    if header.parents.contains(&last.id) {
        return Ok(());
    }
    let (path, before) = (path.to_owned(), before.to_owned());
    if last.parents.iter().any(|parent| header.parents.contains(parent)) {
        return Err(RestoreError::Needless { path, before });
    }
    Err(RestoreError::Order { path, before })
}

/// Hands what the file has to `write`, but for clusters of zeros; the file's id as a full backup.
fn copy(
    file: &File,
    path: &Path,
    size: u64,
    write: impl Fn(&[u8], u64) -> Result<(), RestoreError>,
    mut go_on: impl FnMut(u64) -> bool,
) -> Result<BackupId, RestoreError> {
    let mut fingerprint = Fingerprint::new(size);
    let mut buffer = vec![0; PIECE as usize];
    let mut at = 0;
    while let Some(data) = next_data(file, at, size) {
        at = data;
        let length = PIECE.min(size - at) as usize;
        let piece = buffer.get_mut(..length).unwrap_or_default();
        file.read_exact_at(piece, at).map_err(|source| RestoreError::Read { path: path.to_owned(), source })?;
        for (offset, cluster) in clusters_with_data(piece, at) {
            fingerprint.add(cluster, offset);
            write(cluster, offset)?;
        }
        at += length as u64;
        if !go_on(at) {
            return Err(RestoreError::Interrupted);
        }
    }
    Ok(fingerprint.id())
}

/// The first cluster from `at` that may hold data; nothing where there is none before `size`.
fn next_data(file: &File, at: u64, size: u64) -> Option<u64> {
    if at >= size {
        return None;
    }
    match seek(file, SeekFrom::Data(at)) {
        Ok(data) => Some(at.max(data / CLUSTER * CLUSTER)).filter(|data| *data < size),
        Err(Errno::NXIO) => None,
        // A file system that knows of no holes.
        Err(_) => Some(at),
    }
}
