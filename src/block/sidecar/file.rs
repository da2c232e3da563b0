//! The sidecar as a file, which is always one whole version of it. Only the owner of the image's lock touches it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Contents, SidecarError};
use crate::block::dirty_bitmap::MAX_BYTES;

/// Where an image's sidecar is, if it has one.
#[derive(Clone, Debug)]
pub struct Sidecar {
    path: PathBuf,
}

impl Sidecar {
    /// The sidecar of the image at `path`, from which symbolic links are gone.
    pub fn beside(path: &Path) -> Self {
        Sidecar { path: with_suffix(path, ".bitmaps") }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of the file, for [`Contents::decode`]; nothing if there is no sidecar.
    pub fn read(&self) -> Result<Option<Vec<u8>>, SidecarError> {
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            // O_NONBLOCK: a pipe of this name must not hold the guest's start up. No sidecar is larger than the bitmaps with their names.
            let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&self.path)?;
            file.take(2 * MAX_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        match read() {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.error("read", error)),
        }
    }

    /// Replaces the file, durably when this returns; without bitmaps there is none.
    pub fn write(&self, contents: &Contents<'_>) -> Result<(), SidecarError> {
        if contents.bitmaps.is_empty() {
            return match fs::remove_file(&self.path) {
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                removed => removed.and_then(|()| self.sync_directory()).map_err(|error| self.error("remove", error)),
            };
        }
        let temporary = with_suffix(&self.path, ".new");
        // Of a write that was interrupted.
        let _ = fs::remove_file(&temporary);
        let replace = || {
            // A new file: a link of this name leads nowhere that should be written.
            let mut file = BufWriter::new(OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?);
            contents.encode_to(&mut file)?;
            file.flush()?;
            // Before it has the name: a crash must not leave the name on half a file.
            file.get_ref().sync_all()?;
            fs::rename(&temporary, &self.path)?;
            self.sync_directory()
        };
        replace().map_err(|error| {
            // It may not be there.
            let _ = fs::remove_file(&temporary);
            self.error("write", error)
        })
    }

    /// Gives the file a name under which nobody takes it for a sidecar, durably; returns that name.
    pub fn set_aside(&self) -> Result<PathBuf, SidecarError> {
        let aside = with_suffix(&self.path, ".unusable");
        let renamed = fs::rename(&self.path, &aside).and_then(|()| self.sync_directory());
        renamed.map(|()| aside).map_err(|error| self.error("rename", error))
    }

    fn sync_directory(&self) -> io::Result<()> {
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory)?.sync_all()
    }

    fn error(&self, action: &'static str, source: io::Error) -> SidecarError {
        SidecarError::Io { action, path: self.path.clone(), source }
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}
