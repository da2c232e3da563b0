//! A frame's header.

use super::{HEADER_SIZE, Kind, WireError};
use crate::memory::{PAGE_SIZE, PageRun};

/// A frame's first 16 bytes, already held to the bounds of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Length of the body in bytes, within [`Kind::max_length`].
    pub length: usize,
    /// First page of a run.
    pub page: u64,
}

impl Header {
    /// The header of the contents of `run`, which must be at most [`MAX_RUN`](super::MAX_RUN) pages.
    pub const fn pages(run: PageRun) -> Self {
        Header { kind: Kind::Pages, length: run.count as usize * PAGE_SIZE, page: run.first.0 }
    }

    /// The bytes on the wire.
    pub fn encode(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0] = self.kind as u8;
        bytes[4..8].copy_from_slice(&(self.length as u32).to_le_bytes());
        bytes[8..].copy_from_slice(&self.page.to_le_bytes());
        bytes
    }

    /// Reads a header and bounds it. Whether a run lies within the guest's RAM is checked by who knows its size.
    pub fn decode(bytes: [u8; HEADER_SIZE]) -> Result<Self, WireError> {
        let [kind, a, b, c, l0, l1, l2, l3, page @ ..] = bytes;
        let kind = Kind::ALL.into_iter().find(|known| *known as u8 == kind).ok_or(WireError::UnknownKind(kind))?;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let header = Header { kind, length, page: u64::from_le_bytes(page) };
        if [a, b, c] != [0; 3] || (header.page != 0 && !matches!(kind, Kind::Pages | Kind::Compressed | Kind::Request)) {
            return Err(WireError::Reserved);
        }
        let whole_pages = length > 0 && length.is_multiple_of(PAGE_SIZE);
        if length > kind.max_length() || (kind == Kind::Pages && !whole_pages) || (kind == Kind::Request && length != 8) {
            return Err(WireError::Length { kind, length: length as u64 });
        }
        Ok(header)
    }

    /// The run whose contents follow a `Pages` header.
    pub const fn run(self) -> PageRun {
        PageRun::new(self.page, (self.length / PAGE_SIZE) as u64)
    }
}
