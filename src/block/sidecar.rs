//! The file beside an image that keeps its persistent dirty bitmaps while no Ferry runs: `IMAGE.bitmaps`.
//!
//! | bytes | |
//! |---|---|
//! | 8 | `FERRYDBM` |
//! | 4 | version, little-endian |
//! | any | [`Contents`] in postcard's encoding |
//! | 32 | SHA-256 of all that comes before |
//!
//! A bitmap without bits is inconsistent. While a guest may write to the image its sidecar has no bits, so that whatever ends the guest
//! leaves either a sidecar with all that was recorded, made by a clean shutdown, or bitmaps that are known to be useless.

use std::borrow::Cow;
use std::io::{self, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize, Serializer};
use sha2::{Digest, Sha256};
use thiserror::Error;

mod file;

pub use file::Sidecar;

const MAGIC: [u8; 8] = *b"FERRYDBM";
const VERSION: u32 = 1;
const HEAD: usize = MAGIC.len() + size_of::<u32>();
const HASH: usize = 32;

/// Why a sidecar is of no use.
#[derive(Debug, Error)]
pub enum SidecarError {
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
    /// It is not a sidecar, or not as it was written.
    #[error("it is damaged")]
    Damaged,
    /// Written by another Ferry.
    #[error("it has format {0}, and this Ferry knows {VERSION}")]
    Version(u32),
}

/// What tells whether an image was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStamp {
    /// Size in bytes.
    pub size: u64,
    /// Time of the last change, in seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds.
    pub nanoseconds: i64,
}

/// What a sidecar says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents<'a> {
    /// The image when the bitmaps were stored.
    pub image: ImageStamp,
    /// The image's persistent bitmaps.
    #[serde(borrow)]
    pub bitmaps: Vec<StoredBitmap<'a>>,
}

/// A persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredBitmap<'a> {
    /// Its name.
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    /// Bytes of the disk for each bit.
    pub granularity: u32,
    /// Whether it records changes.
    pub enabled: bool,
    /// Its bits, or nothing if it is inconsistent.
    #[serde(borrow)]
    pub pieces: Option<Vec<Piece<'a>>>,
}

/// 4 KiB of bits, or less at the end; those that are all zero are left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece<'a> {
    /// Which piece, counted from the disk's beginning.
    pub index: u64,
    /// Words, little-endian.
    #[serde(borrow, serialize_with = "as_bytes")]
    pub bytes: Cow<'a, [u8]>,
}

fn as_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

impl StoredBitmap<'_> {
    /// A bitmap by name only, which a reader takes as inconsistent.
    pub fn listed(name: &str, granularity: u32) -> StoredBitmap<'static> {
        StoredBitmap { name: Cow::Owned(name.to_owned()), granularity, enabled: false, pieces: None }
    }
}

impl<'a> Contents<'a> {
    /// Whether any bitmap could be taken for consistent.
    pub fn has_bits(&self) -> bool {
        self.bitmaps.iter().any(|bitmap| bitmap.pieces.is_some())
    }

    /// Reads a sidecar. What it says of bitmaps is not checked, only that it is what was written.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, SidecarError> {
        let (magic, rest) = bytes.split_first_chunk().ok_or(SidecarError::Damaged)?;
        let (version, rest) = rest.split_first_chunk().ok_or(SidecarError::Damaged)?;
        let (body, hash) = rest.split_last_chunk::<HASH>().ok_or(SidecarError::Damaged)?;
        if *magic != MAGIC {
            return Err(SidecarError::Damaged);
        }
        if u32::from_le_bytes(*version) != VERSION {
            return Err(SidecarError::Version(u32::from_le_bytes(*version)));
        }
        let hashed = bytes.get(..HEAD + body.len()).ok_or(SidecarError::Damaged)?;
        if Sha256::digest(hashed)[..] != hash[..] {
            return Err(SidecarError::Damaged);
        }
        match postcard::take_from_bytes(body) {
            Ok((contents, [])) => Ok(contents),
            _ => Err(SidecarError::Damaged),
        }
    }

    /// Writes a sidecar.
    pub fn encode_to(&self, target: impl Write) -> io::Result<()> {
        let mut hashing = Hashing { target, hash: Sha256::new() };
        hashing.write_all(&MAGIC)?;
        hashing.write_all(&VERSION.to_le_bytes())?;
        postcard::to_io(self, &mut hashing).map_err(io::Error::other)?;
        let Hashing { mut target, hash } = hashing;
        target.write_all(&hash.finalize())
    }
}

struct Hashing<W> {
    target: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.target.write(bytes)?;
        self.hash.update(bytes.get(..written).unwrap_or(bytes));
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.target.flush()
    }
}

#[cfg(test)]
mod tests;
