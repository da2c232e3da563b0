//! Direct I/O (`O_DIRECT`, open(2)): past the host's page cache, with what the kernel asks to be aligned.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use rustix::fs::{AtFlags, StatxFlags, statx};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Alignment that nearly all file systems are content with, for kernels that do not tell (before Linux 6.1, or `tmpfs`).
const ASSUMED: usize = 4096;
/// Largest buffer for what is not aligned, in bytes.
const BUFFER: u64 = 1 << 20;

/// What direct I/O on a file needs. Requests that are not so aligned go through a buffer that is.
#[derive(Debug)]
pub(super) struct Direct {
    /// Alignment of memory in bytes, a power of two.
    memory: usize,
    /// Alignment of offsets and lengths in bytes, a power of two.
    block: u64,
    /// Held alone by a write that must first read the rest of a block, so that no other change of the block falls in between.
    changes: RwLock<()>,
}

impl Direct {
    /// What `file`, which is open with `O_DIRECT`, needs; nothing if it has no direct I/O after all.
    pub(super) fn of(file: &File) -> io::Result<Option<Self>> {
        let known = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
        let (memory, block) = match known.stx_mask & StatxFlags::DIOALIGN.bits() {
            0 => (ASSUMED, ASSUMED as u64),
            _ => (known.stx_dio_mem_align as usize, u64::from(known.stx_dio_offset_align)),
        };
        let usable = memory.is_power_of_two() && block.is_power_of_two() && block <= BUFFER;
        Ok(usable.then(|| Direct { memory, block, changes: RwLock::default() }))
    }

    /// Alignment of offsets and lengths in bytes.
    pub(super) fn block(&self) -> u64 {
        self.block
    }

    /// Whether the kernel takes `slices` as they are.
    pub(super) fn suits<B: BitmapSlice>(&self, slices: &[VolatileSlice<B>], offset: u64) -> bool {
        let aligned = |slice: &VolatileSlice<B>| {
            (slice.ptr_guard().as_ptr() as usize).is_multiple_of(self.memory) && (slice.len() as u64).is_multiple_of(self.block)
        };
        offset.is_multiple_of(self.block) && slices.iter().all(aligned)
    }

    /// To be held by any change of the file but [`Direct::write`], while it goes on.
    pub(super) fn changing(&self) -> RwLockReadGuard<'_, ()> {
        self.changes.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads through a buffer. `deliver` is given the pieces in order.
    pub(super) fn read(&self, file: &File, offset: u64, length: u64, mut deliver: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = Buffer::new(self, length);
        for piece in self.pieces(offset, length) {
            let blocks = buffer.blocks(&piece)?;
            file.read_exact_at(blocks, piece.start)?;
            deliver(blocks.get(piece.wanted()).ok_or(io::ErrorKind::InvalidInput)?);
        }
        Ok(())
    }

    /// Writes through a buffer. `fetch` fills the pieces in order.
    pub(super) fn write(&self, file: &File, offset: u64, length: u64, mut fetch: impl FnMut(&mut [u8])) -> io::Result<()> {
        let mut buffer = Buffer::new(self, length);
        let mut old = Buffer::new(self, self.block);
        for piece in self.pieces(offset, length) {
            let blocks = buffer.blocks(&piece)?;
            // Before the lock: guest memory may have to come from another host first.
            fetch(blocks.get_mut(piece.wanted()).ok_or(io::ErrorKind::InvalidInput)?);
            if piece.before == 0 && piece.after == 0 {
                let _changing = self.changing();
                file.write_all_at(blocks, piece.start)?;
                continue;
            }
            let _alone = self.changes.write().unwrap_or_else(PoisonError::into_inner);
            let edge = Piece { start: 0, before: 0, length: self.block, after: 0 };
            let last = piece.blocks() - self.block;
            let wanted = piece.wanted();
            for start in [(piece.before > 0).then_some(0), (piece.after > 0).then_some(last)].into_iter().flatten() {
                let old = old.blocks(&edge)?;
                file.read_exact_at(old, piece.start + start)?;
                for (at, byte) in (start as usize..).zip(old.iter()).filter(|(at, _)| !wanted.contains(at)) {
                    *blocks.get_mut(at).ok_or(io::ErrorKind::InvalidInput)? = *byte;
                }
            }
            file.write_all_at(blocks, piece.start)?;
        }
        Ok(())
    }

    /// The range in pieces that each fit into a buffer.
    fn pieces(&self, offset: u64, length: u64) -> impl Iterator<Item = Piece> + use<> {
        let (block, end) = (self.block, offset + length);
        let mut at = offset;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let start = at - at % block;
                let stop = end.min(start + BUFFER);
                let piece = Piece { start, before: at - start, length: stop - at, after: stop.next_multiple_of(block) - stop };
                at = stop;
                piece
            })
        })
    }
}

/// Whole blocks from `start` on, and the part of them that is wanted. In bytes.
struct Piece {
    start: u64,
    before: u64,
    length: u64,
    after: u64,
}

impl Piece {
    fn blocks(&self) -> u64 {
        self.before + self.length + self.after
    }

    fn wanted(&self) -> std::ops::Range<usize> {
        self.before as usize..(self.before + self.length) as usize
    }
}

/// Memory with an aligned part.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// For pieces of a range of `length` bytes.
    fn new(direct: &Direct, length: u64) -> Self {
        // A range may lie in one block more than its length takes.
        let size = (length.next_multiple_of(direct.block) + direct.block).min(BUFFER) as usize;
        let bytes = vec![0; size + direct.memory];
        let start = bytes.as_ptr().align_offset(direct.memory);
        Buffer { bytes, start }
    }

    fn blocks(&mut self, piece: &Piece) -> io::Result<&mut [u8]> {
        let aligned = self.bytes.get_mut(self.start..).and_then(|aligned| aligned.get_mut(..piece.blocks() as usize));
        aligned.ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
    }
}

#[cfg(test)]
mod tests;
