//! The contents of copied disks on their way: the only place of a migration that reads or writes images.

use std::io;
use std::sync::Arc;

use thiserror::Error;

use super::page_io::Span;
use crate::block::block_run::{BlockRun, COPY_BLOCK};
use crate::block::disk::{Disk, DiskError};
use crate::memory::PageRun;
use crate::migrate::layout::{Layout, Place};

static ZEROES: [u8; COPY_BLOCK as usize] = [0; COPY_BLOCK as usize];

/// Why blocks could not be moved.
#[derive(Debug, Error)]
pub enum BlockIoError {
    /// That disk is not copied.
    #[error("{0} are no blocks of a disk that is copied")]
    NoDisk(PageRun),
    /// The image says no.
    #[error("disk {id}: cannot {action} its image: {source}")]
    Io {
        /// The disk.
        id: String,
        /// What was attempted.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The disk says no.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// The disks of a guest that are copied. Clones, which are made for each frame, share them.
#[derive(Clone, Debug)]
pub struct BlockIo(Arc<Disks>);

#[derive(Debug)]
struct Disks {
    layout: Layout,
    disks: Vec<Arc<Disk>>,
}

impl BlockIo {
    /// All disks of the guest, those that are copied as `layout` says.
    pub fn new(layout: Layout, disks: Vec<Arc<Disk>>) -> Self {
        BlockIo(Arc::new(Disks { layout, disks }))
    }

    /// How pages are numbered.
    pub fn layout(&self) -> &Layout {
        &self.0.layout
    }

    /// The disks that are copied, and their pages.
    pub fn disks(&self) -> impl Iterator<Item = (&Arc<Disk>, PageRun)> {
        self.0.layout.disks().filter_map(|(index, pages)| Some((self.0.disks.get(index)?, pages)))
    }

    /// The disks that are not copied.
    pub fn shared_disks(&self) -> impl Iterator<Item = &Arc<Disk>> {
        let is_shared = |index: usize| self.0.layout.pages_of(index).is_none();
        self.0.disks.iter().enumerate().filter(move |(index, _)| is_shared(*index)).map(|(_, disk)| disk)
    }

    /// What `run` is, if those are blocks.
    pub fn blocks(&self, run: PageRun) -> Option<(&Arc<Disk>, BlockRun)> {
        match self.0.layout.place(run)? {
            Place::Disk(index, blocks) => Some((self.0.disks.get(index)?, blocks)),
            Place::Ram(_) => None,
        }
    }

    fn find(&self, run: PageRun) -> Result<(&Arc<Disk>, BlockRun), BlockIoError> {
        self.blocks(run).ok_or(BlockIoError::NoDisk(run))
    }

    /// Makes `into` the contents of `run`.
    pub fn read(&self, run: PageRun, into: &mut Vec<u8>) -> Result<(), BlockIoError> {
        let (disk, blocks) = self.find(run)?;
        into.resize(run.bytes() as usize, 0);
        disk.read_blocks(blocks.first, into).map_err(|source| failed(disk, "read", source))
    }

    /// Writes `contents` of `run`, zeros where there are none, unless the guest has written there itself.
    pub fn place(&self, run: PageRun, contents: Option<&[u8]>) -> Result<(), BlockIoError> {
        let (disk, blocks) = self.find(run)?;
        let arriving = disk.arriving().ok_or(BlockIoError::NoDisk(run))?;
        let placed = match contents {
            Some(contents) => arriving.place(blocks, contents),
            None => arriving.place_zeroes(blocks),
        };
        placed.map_err(|source| failed(disk, "write", source))
    }
}

/// Splits `run` into spans that are zero and that are not; `contents` are those of its pages.
pub fn split_zero(run: PageRun, contents: &[u8]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for (page, bytes) in run.pages().zip(contents.chunks(COPY_BLOCK as usize)) {
        let is_zero = bytes == ZEROES;
        match spans.last_mut().filter(|span| span.is_zero == is_zero) {
            Some(span) => span.run.count += 1,
            None => spans.push(Span { run: PageRun::single(page), is_zero }),
        }
    }
    spans
}

fn failed(disk: &Disk, action: &'static str, source: io::Error) -> BlockIoError {
    BlockIoError::Io { id: disk.config().id.clone(), action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_blocks_are_told_from_others() {
        let mut contents = vec![0; 6 * 4096];
        contents[4096] = 1;
        contents[3 * 4096 - 1] = 1;
        contents[5 * 4096 + 7] = 1;
        let span = |first, count, is_zero| Span { run: PageRun::new(first, count), is_zero };
        let spans = [span(100, 1, true), span(101, 2, false), span(103, 2, true), span(105, 1, false)];
        assert_eq!(split_zero(PageRun::new(100, 6), &contents), spans);
    }
}
