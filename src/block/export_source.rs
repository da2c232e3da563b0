//! What can be exported: a disk as it is now, or a frozen point in time of it.

use std::io;

/// Content of a disk for readers outside the guest. Offsets and lengths are in bytes; a range that reaches beyond [`ExportSource::size`] is
/// an `InvalidInput` error.
pub trait ExportSource: Send + Sync {
    /// Size in bytes, a positive multiple of 512.
    fn size(&self) -> u64;

    /// Logical block size in bytes, the unit of reads.
    fn block_size(&self) -> u32;

    /// Reads exactly `target.len()` bytes. An error where the content is not, or no longer, this process's to read; never stale data.
    fn read_at(&self, target: &mut [u8], offset: u64) -> io::Result<()>;

    /// The first extent from `offset`: not empty, and at most `length` bytes, of which there must be some.
    fn allocation(&self, offset: u64, length: u64) -> io::Result<Extent>;
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// In bytes.
    pub length: u64,
    /// What is there.
    pub kind: ExtentKind,
}

/// What is known of an extent: the three answers of `base:allocation` in the NBD protocol ("Metadata querying").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// May hold anything.
    Data,
    /// Takes space and reads as zeros.
    Zero,
    /// Takes no space and reads as zeros.
    Hole,
}
