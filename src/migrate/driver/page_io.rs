//! The contents of guest pages on their way: the only place of a migration that reads or writes guest RAM. No reference to it is ever
//! made, because the guest may write it at any time.

use std::io;
use std::time::Instant;

use rustix::mm::{Advice, madvise};
use thiserror::Error;

use crate::memory::{GuestRam, HostPage, PAGE_SIZE, PageNumber, PageRun};
use crate::migrate::transport::{LinkError, Reader, Writer};

/// Pages that are fetched into the processor's cache before they are looked at.
const LOOK_AHEAD: u64 = 8;

/// Why pages could not be moved.
#[derive(Debug, Error)]
pub enum PageIoError {
    /// The pages do not exist.
    #[error("{0} lie beyond guest memory")]
    Beyond(PageRun),
    /// The kernel did not take the pages back.
    #[error("cannot discard {run}: {source}")]
    Discard {
        /// The pages.
        run: PageRun,
        /// What the kernel said.
        source: io::Error,
    },
    /// The connection failed.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// A part of what is sent at once.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// Frame headers and the like.
    Bytes(&'a [u8]),
    /// The contents of guest pages.
    Pages(PageRun),
}

/// Neighbouring pages that are all zero, or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The pages.
    pub run: PageRun,
    /// Whether they hold nothing but zeros.
    pub is_zero: bool,
}

/// Reads and writes a guest's pages. Clones share the RAM.
#[derive(Clone, Debug)]
pub struct PageIo {
    ram: GuestRam,
}

impl PageIo {
    /// For the pages of `ram`.
    pub fn new(ram: GuestRam) -> Self {
        PageIo { ram }
    }

    /// How many there are.
    pub fn pages(&self) -> u64 {
        self.ram.pages()
    }

    /// Whether `page` holds nothing but zeros. A page that the guest writes meanwhile may count as either: its write is in the dirty log.
    pub fn is_zero(&self, page: PageNumber) -> Result<bool, PageIoError> {
        const WORD: usize = size_of::<u64>();
        let run = PageRun::single(page);
        let start = self.ram.host_address(run).ok_or(PageIoError::Beyond(run))?;
        // Most pages that are not zero show it here. The first word is also what the comparison below starts from.
        let probes = [0, PAGE_SIZE / 4 + WORD, PAGE_SIZE / 2, PAGE_SIZE - WORD];
        // SAFETY: the page is mapped, the offsets are aligned and within it.
        if probes.iter().any(|offset| unsafe { start.as_ptr().add(*offset).cast::<u64>().read_volatile() } != 0) {
            return Ok(false);
        }
        // A page whose first word is zero and that equals itself moved by a word is zero; comparing is what the C library does fastest.
        // SAFETY: both ranges lie within the page, which is mapped.
        Ok(unsafe { libc::memcmp(start.as_ptr().cast(), start.as_ptr().add(WORD).cast(), PAGE_SIZE - WORD) } == 0)
    }

    /// The first pages of `run` that are alike, zero or not: at most `max`, at least one `unit`, only all of which is zero. `None` when the
    /// run is empty.
    pub fn next_span(&self, run: PageRun, max: u64, unit: HostPage) -> Result<Option<Span>, PageIoError> {
        if run.count == 0 {
            return Ok(None);
        }
        let unit = unit.pages();
        let is_unit_zero = |first: u64| {
            let mut pages = (first..first + unit.min(run.end() - first)).map(|page| self.is_zero(PageNumber(page)));
            pages.try_fold(true, |zero, page| if zero { page } else { Ok(false) })
        };
        let is_zero = is_unit_zero(run.first.0)?;
        let mut count = unit.min(run.count);
        self.prefetch(PageRun { count: run.count.min(LOOK_AHEAD), ..run });
        while count < run.count && count + unit <= max && is_unit_zero(run.first.0 + count)? == is_zero {
            self.prefetch(PageRun::new(run.first.0 + count + LOOK_AHEAD, unit.min(run.count - count)));
            count += unit.min(run.count - count);
        }
        Ok(Some(Span { run: PageRun { first: run.first, count }, is_zero }))
    }

    /// Has the processor fetch the first bytes of pages that are looked at next: otherwise each look would wait for memory.
    fn prefetch(&self, run: PageRun) {
        for page in run.pages() {
            if let Some(start) = self.ram.host_address(PageRun::single(page)) {
                // SAFETY: a prefetch reads nothing that the program could see, and faults on no address.
                #[cfg(target_arch = "x86_64")]
                unsafe {
                    std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(start.as_ptr().cast());
                }
            }
        }
    }

    /// Splits `run` into spans of at most `max` pages, in order, looking at the pages as it goes. Each `unit` lies in one of them.
    pub fn split_zero(&self, run: PageRun, max: u64, unit: HostPage) -> impl Iterator<Item = Result<Span, PageIoError>> + '_ {
        let mut rest = run;
        std::iter::from_fn(move || {
            let span = self.next_span(rest, max, unit).transpose()?;
            rest = match &span {
                Ok(span) => PageRun::new(span.run.end(), rest.count - span.run.count),
                Err(_) => PageRun::new(0, 0),
            };
            Some(span)
        })
    }

    /// Sends `pieces` in order, pages straight from guest RAM.
    pub fn send(&self, pieces: &[Piece<'_>], writer: &mut Writer, deadline: Option<Instant>) -> Result<(), PageIoError> {
        let raw: Result<Vec<_>, PageIoError> = pieces
            .iter()
            .map(|piece| match *piece {
                Piece::Bytes(bytes) => Ok(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }),
                Piece::Pages(run) => {
                    let start = self.ram.host_address(run).ok_or(PageIoError::Beyond(run))?;
                    Ok(libc::iovec { iov_base: start.as_ptr().cast(), iov_len: run.bytes() as usize })
                }
            })
            .collect();
        // SAFETY: headers are borrowed until this returns, and guest RAM is mapped for as long as `self.ram`.
        Ok(unsafe { writer.write_all_raw(&mut raw?, deadline) }?)
    }

    /// Receives the contents of `run` straight into guest RAM, for precopy: the guest must not run here yet.
    pub fn receive(&self, run: PageRun, reader: &mut Reader, deadline: Option<Instant>) -> Result<(), PageIoError> {
        let start = self.ram.host_address(run).ok_or(PageIoError::Beyond(run))?;
        // SAFETY: the range is mapped for as long as `self.ram`, and nothing holds references to guest RAM.
        Ok(unsafe { reader.read_exact_raw(start.as_ptr(), run.bytes() as usize, deadline) }?)
    }

    /// Throws the contents of `run` away, so that it reads as zeros. Not once userfaultfd watches RAM: then its pages would be missing.
    pub fn discard(&self, run: PageRun) -> Result<(), PageIoError> {
        let start = self.ram.host_address(run).ok_or(PageIoError::Beyond(run))?;
        if !self.ram.host_page().divides(run) {
            // SAFETY: the range lies within guest RAM, to which nothing holds references.
            unsafe { start.as_ptr().write_bytes(0, run.bytes() as usize) };
            return Ok(());
        }
        // SAFETY: the range lies within guest RAM, to which nothing holds references.
        let discarded = unsafe { madvise(start.as_ptr().cast(), run.bytes() as usize, Advice::LinuxDontNeed) };
        discarded.map_err(|errno| PageIoError::Discard { run, source: errno.into() })
    }

    /// Copies the contents of `run` to the end of `into`.
    pub fn copy(&self, run: PageRun, into: &mut Vec<u8>) -> Result<(), PageIoError> {
        let start = self.ram.host_address(run).ok_or(PageIoError::Beyond(run))?;
        let length = run.bytes() as usize;
        into.reserve(length);
        // SAFETY: the pages are mapped, there is room for them behind what `into` holds, and `into` is no part of guest RAM.
        unsafe {
            into.as_mut_ptr().add(into.len()).copy_from_nonoverlapping(start.as_ptr(), length);
            into.set_len(into.len() + length);
        }
        Ok(())
    }

    /// Writes `contents`, which must be as long, to `run`, for precopy: the guest must not run here yet.
    pub fn write(&self, run: PageRun, contents: &[u8]) -> Result<(), PageIoError> {
        let start = self.ram.host_address(run).filter(|_| contents.len() as u64 == run.bytes()).ok_or(PageIoError::Beyond(run))?;
        // SAFETY: the pages are mapped, nothing holds references to guest RAM, and `contents` is no part of it.
        unsafe { start.as_ptr().copy_from_nonoverlapping(contents.as_ptr(), contents.len()) };
        Ok(())
    }
}

#[cfg(test)]
mod tests;
