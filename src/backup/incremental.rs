//! An incremental backup as a file.
//!
//! | bytes | |
//! |---|---|
//! | 8 | `FERRYINC` |
//! | 4 | version, little-endian |
//! | 4 | bytes of the header, little-endian |
//! | any | [`Header`] in postcard's encoding |
//! | any | records, in ascending order and apart from each other: kind (4 bytes), offset and length (8 bytes each, little-endian), and the bytes of the disk where the kind is data |
//! | 20 | a record of the kind end, with zeros |
//! | 32 | SHA-256 of all that comes before |

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::id::BackupId;

const MAGIC: [u8; 8] = *b"FERRYINC";
const VERSION: u32 = 1;
/// Longest header in bytes.
const MAX_HEADER: u32 = 64 << 10;
/// Most bytes of data in one record.
pub const MAX_DATA: usize = 1 << 20;
const END: u32 = 0;
const DATA: u32 = 1;
const ZEROS: u32 = 2;

/// Why a file cannot be taken as an incremental backup.
#[derive(Debug, Error)]
pub enum FormatError {
    /// It cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("it is no incremental backup")]
    Other,
    /// Written by another Ferry.
    #[error("it has format {0}, and this Ferry knows {VERSION}")]
    Version(u32),
    /// It is not as it was written.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
}

/// What an incremental backup says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Its id.
    pub id: BackupId,
    /// The backups that it can follow: it has all that was changed since any of these. There is more than one where the backup before may or
    /// may not have come to its end.
    pub parents: Vec<BackupId>,
    /// Id of the disk, for people.
    pub disk: String,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes of the disk for each bit of the dirty bitmap.
    pub granularity: u64,
}

/// What a range of the disk has become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// So many zeros.
    Zeros(u64),
}

/// Writes an incremental backup.
#[derive(Debug)]
pub struct Writer<W> {
    target: W,
    hash: Sha256,
}

impl<W: Write> Writer<W> {
    /// Begins with the header.
    pub fn new(target: W, header: &Header) -> io::Result<Self> {
        let mut writer = Writer { target, hash: Sha256::new() };
        let header = postcard::to_allocvec(header).map_err(io::Error::other)?;
        writer.write(&[&MAGIC[..], &VERSION.to_le_bytes(), &(header.len() as u32).to_le_bytes(), &header].concat())?;
        Ok(writer)
    }

    /// Writes what the disk has at `offset`: at most [`MAX_DATA`] bytes, or any number of zeros.
    pub fn change(&mut self, offset: u64, change: Change<'_>) -> io::Result<()> {
        match change {
            Change::Data(bytes) => {
                self.record(DATA, offset, bytes.len() as u64)?;
                self.write(bytes)
            }
            Change::Zeros(length) => self.record(ZEROS, offset, length),
        }
    }

    /// Ends it; the rest is the target's to make durable.
    pub fn finish(mut self) -> io::Result<W> {
        self.record(END, 0, 0)?;
        self.target.write_all(&self.hash.finalize())?;
        self.target.flush()?;
        Ok(self.target)
    }

    fn record(&mut self, kind: u32, offset: u64, length: u64) -> io::Result<()> {
        self.write(&[&kind.to_le_bytes()[..], &offset.to_le_bytes(), &length.to_le_bytes()].concat())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.target.write_all(bytes)
    }
}

/// Reads an incremental backup. What it gives is not known to be as it was written before [`Reader::next_change`] has given the end.
#[derive(Debug)]
pub struct Reader<R> {
    source: R,
    hash: Sha256,
    header: Header,
    /// Where the last record ended.
    at: u64,
    data: Vec<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    pub fn new(mut source: R) -> Result<Self, FormatError> {
        let mut hash = Sha256::new();
        let mut begin = [0; 16];
        match source.read_exact(&mut begin) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(FormatError::Other),
            read => read?,
        }
        hash.update(begin);
        let [magic_low, magic_high, version, length] =
            [0, 1, 2, 3].map(|word: usize| begin.as_chunks().0.get(word).copied().unwrap_or_default());
        if [magic_low, magic_high].as_flattened() != MAGIC {
            return Err(FormatError::Other);
        }
        if u32::from_le_bytes(version) != VERSION {
            return Err(FormatError::Version(u32::from_le_bytes(version)));
        }
        let length = u32::from_le_bytes(length);
        if length > MAX_HEADER {
            return Err(FormatError::Damaged("its header is too long"));
        }
        let mut bytes = Vec::new();
        (&mut source).take(length.into()).read_to_end(&mut bytes)?;
        hash.update(&bytes);
        let header: Header = match postcard::take_from_bytes(&bytes) {
            Ok((header, [])) if bytes.len() == length as usize => header,
            _ => return Err(FormatError::Damaged("its header cannot be read")),
        };
        Ok(Reader { source, hash, header, at: 0, data: Vec::new() })
    }

    /// What it says of itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next change, with its offset, within the disk and behind the one before; nothing at the end, which is there only where all was as
    /// it was written.
    pub fn next_change(&mut self) -> Result<Option<(u64, Change<'_>)>, FormatError> {
        let mut record = [0; 20];
        self.read(&mut record)?;
        let (kind, rest) = record.split_first_chunk().ok_or(FormatError::Damaged("half a record"))?;
        let [offset, length] = [0, 1].map(|word: usize| u64::from_le_bytes(rest.as_chunks().0.get(word).copied().unwrap_or_default()));
        let kind = u32::from_le_bytes(*kind);
        if kind == END {
            return self.check_end(offset, length).map(|()| None);
        }
        let end = offset.checked_add(length).filter(|end| offset >= self.at && length > 0 && *end <= self.header.size);
        self.at = end.ok_or(FormatError::Damaged("a record is out of place"))?;
        match kind {
            DATA if length <= MAX_DATA as u64 => {
                let mut data = std::mem::take(&mut self.data);
                data.clear();
                (&mut self.source).take(length).read_to_end(&mut data)?;
                if (data.len() as u64) < length {
                    return Err(FormatError::Damaged("it ends too early"));
                }
                self.hash.update(&data);
                self.data = data;
                Ok(Some((offset, Change::Data(&self.data))))
            }
            ZEROS => Ok(Some((offset, Change::Zeros(length)))),
            _ => Err(FormatError::Damaged("a record of no known kind")),
        }
    }

    fn check_end(&mut self, offset: u64, length: u64) -> Result<(), FormatError> {
        let mut hash = [0; 32];
        let expected: [u8; 32] = self.hash.clone().finalize().into();
        self.read(&mut hash)?;
        if hash != expected || (offset, length) != (0, 0) {
            return Err(FormatError::Damaged("its checksum is wrong"));
        }
        match self.source.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(FormatError::Damaged("there is more behind its end")),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), FormatError> {
        match self.source.read_exact(bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(FormatError::Damaged("it ends too early")),
            read => {
                read?;
                self.hash.update(&bytes);
                Ok(())
            }
        }
    }
}
