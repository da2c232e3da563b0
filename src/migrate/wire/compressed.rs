//! The frame of compressed pages.

use super::MAX_RUN;
use crate::memory::PageRun;

/// Bytes before the compressed contents: a count, a method and a zero.
pub(super) const COMPRESSED_PREFIX: usize = 4;

/// How contents are compressed; the number is the one on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Method {
    /// An LZ4 block.
    Lz4 = 1,
    /// A Zstandard frame.
    Zstd = 2,
}

/// Contents of pages, compressed as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// The pages: 1 to [`MAX_RUN`]. The contents decompress to exactly their length.
    pub run: PageRun,
    /// How.
    pub method: Method,
    /// The compressed contents.
    pub contents: Vec<u8>,
}

impl Compressed {
    /// What goes before the contents.
    pub(super) fn extend(&self, bytes: &mut Vec<u8>) {
        // At most MAX_RUN.
        bytes.extend((self.run.count as u16).to_le_bytes());
        bytes.extend([self.method as u8, 0]);
        bytes.extend(&self.contents);
    }

    /// Reads a body; nothing where it makes no sense.
    pub(super) fn decode(first: u64, body: &[u8]) -> Option<Self> {
        let (&[low, high, method, 0], contents) = body.split_first_chunk::<COMPRESSED_PREFIX>()? else { return None };
        let method = [Method::Lz4, Method::Zstd].into_iter().find(|known| *known as u8 == method)?;
        let count = u64::from(u16::from_le_bytes([low, high]));
        (1..=MAX_RUN).contains(&count).then(|| Compressed { run: PageRun::new(first, count), method, contents: contents.to_vec() })
    }
}
