//! An image that comes with a migration: made as `PATH.incoming`, and called `PATH` when all of it is here. So what has its name is whole.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, OFlags, RenameFlags, fcntl_setfl, renameat_with};
use rustix::io::Errno;
use thiserror::Error;

use super::{Image, ImageError, LockError, LockedImage};
use crate::vm::config::CacheMode;

/// Largest image that arrives, in bytes: 16 TiB. Which blocks of it are there takes 512 MiB of memory.
pub const MAX_SIZE: u64 = 16 << 40;

/// Why there is no image for a disk to arrive in.
#[derive(Debug, Error)]
pub enum IncomingError {
    /// The path is taken, perhaps by what somebody needs.
    #[error("{0} is there already, and a migration that copies storage makes the image: remove or rename it, or name another path")]
    Exists(PathBuf),
    /// The image's directory does not exist.
    #[error("{0} cannot be made, because its directory does not exist: make the directory, or name another path")]
    NoDirectory(PathBuf),
    /// The source says that the disk is larger than any that is received.
    #[error("{path} would have {size} bytes, more than the {MAX_SIZE} that a migration can bring")]
    TooLarge {
        /// The image.
        path: PathBuf,
        /// How large it would be.
        size: u64,
    },
    /// Another migration is bringing an image of this name, or has not come to its end.
    #[error(
        "{0} is there already: another Ferry receives this disk, or one was killed when it did; if nobody needs what the guest has written \
         there, remove it, or name another path"
    )]
    LeftBehind(PathBuf),
    /// Something took the path while the image was arriving.
    #[error("cannot rename {incoming}, in which the disk has arrived, to {path}, because that is there now: remove or rename it")]
    Taken {
        /// The image.
        incoming: PathBuf,
        /// What it should be called.
        path: PathBuf,
    },
    /// The file system says no.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The image is of no use, though it could be made.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// The name of an image that is arriving. Dropped before it is [committed](IncomingFile::commit), it removes the file.
#[derive(Debug)]
pub struct IncomingFile {
    incoming: PathBuf,
    path: PathBuf,
    state: NameState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NameState {
    Incoming,
    /// The guest may have written there.
    Committed,
    /// It has its name, but not durably.
    Renamed,
    Kept,
    Removed,
}

impl IncomingFile {
    /// Makes an image of `size` bytes, all zeros that take no space, which will be at `path`, and locks it. One that was left behind is not
    /// touched: a guest may have written there.
    pub fn create(path: &Path, size: u64, cache: CacheMode) -> Result<(Self, LockedImage), IncomingError> {
        if size > MAX_SIZE {
            return Err(IncomingError::TooLarge { path: path.to_owned(), size });
        }
        let incoming = with_suffix(path, ".incoming");
        let failed = |action, path: &Path, source| IncomingError::Io { action, path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(_) => return Err(IncomingError::Exists(path.to_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look for", path, error)),
        }
        // Direct I/O comes later: where there is none, an open that asks for it fails after the file was made.
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&incoming).map_err(|error| match error.kind() {
                ErrorKind::AlreadyExists => IncomingError::LeftBehind(incoming.clone()),
                ErrorKind::NotFound => IncomingError::NoDirectory(path.to_owned()),
                _ => failed("create", &incoming, error),
            })?;
        // From here on the file is removed if something fails.
        let name = IncomingFile { incoming, path: path.to_owned(), state: NameState::Incoming };
        file.set_len(size).map_err(|error| failed("make room in", &name.incoming, error))?;
        if cache == CacheMode::None {
            fcntl_setfl(&file, OFlags::DIRECT).map_err(|errno| match errno {
                Errno::INVAL => IncomingError::Image(ImageError::NoDirectIo { path: path.to_owned() }),
                errno => failed("use direct I/O on", &name.incoming, errno.into()),
            })?;
        }
        let image = Image::of(file, path.to_owned(), false, cache)?;
        let locked = image.lock().map_err(|LockError { error, .. }| error)?;
        Ok((name, locked))
    }

    /// The guest is about to write there: the file stays, whatever happens.
    pub fn commit(&mut self) {
        if self.state == NameState::Incoming {
            self.state = NameState::Committed;
        }
    }

    /// Gives the image its name, never over something that is there, durably. Does nothing the second time.
    pub fn keep(&mut self) -> Result<(), IncomingError> {
        match self.state {
            NameState::Kept => return Ok(()),
            NameState::Renamed => {}
            NameState::Incoming | NameState::Committed | NameState::Removed => self.rename()?,
        }
        let durable = self.sync();
        durable.map_err(|source| IncomingError::Io { action: "make durable the name of", path: self.path.clone(), source })?;
        self.state = NameState::Kept;
        Ok(())
    }

    fn rename(&mut self) -> Result<(), IncomingError> {
        let (incoming, path) = (&self.incoming, &self.path);
        let renamed = match renameat_with(CWD, incoming, CWD, path, RenameFlags::NOREPLACE) {
            // The file system, or the kernel, does not know the flag.
            Err(Errno::INVAL | Errno::NOSYS) => link_instead(incoming, path),
            done => done.map_err(io::Error::from),
        };
        renamed.map_err(|source| match source.kind() {
            ErrorKind::AlreadyExists => IncomingError::Taken { incoming: incoming.clone(), path: path.clone() },
            _ => IncomingError::Io { action: "rename", path: incoming.clone(), source },
        })?;
        self.state = NameState::Renamed;
        Ok(())
    }

    /// The file, if a guest has written there and it has not got its name.
    pub fn incomplete(&self) -> Option<&Path> {
        (self.state == NameState::Committed).then_some(&self.incoming)
    }

    /// Whether the file has its name, durably.
    pub fn is_kept(&self) -> bool {
        self.state == NameState::Kept
    }

    /// Removes the file unless the guest may have written there. Whether it was.
    pub fn remove_unless_committed(&mut self) -> bool {
        let is_removed = self.state == NameState::Incoming;
        if is_removed {
            self.state = NameState::Removed;
            // Nobody can be told. Who tries again is.
            let _ = fs::remove_file(&self.incoming);
        }
        is_removed
    }

    fn sync(&self) -> io::Result<()> {
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory)?.sync_all()
    }
}

impl Drop for IncomingFile {
    fn drop(&mut self) {
        self.remove_unless_committed();
    }
}

fn link_instead(incoming: &Path, path: &Path) -> io::Result<()> {
    fs::hard_link(incoming, path)?;
    // The image has its name. One too many does no harm.
    let _ = fs::remove_file(incoming);
    Ok(())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests;
