//! Pages and bitmaps in the background.

use std::time::{Duration, Instant};

use super::super::page_io::{PageIo, Piece};
use super::links::wire_bytes;
use crate::memory::PageRun;
use crate::migrate::driver::page_io::PageIoError;
use crate::migrate::source::Sent;
use crate::migrate::transport::Writer;
use crate::migrate::wire::{Frame, HEADER_SIZE, Header, MAX_RUN, WireError};

/// A run of pages as it will go out: pages that are zero by name, all others with their contents.
pub struct Parcel {
    zero: Option<Vec<u8>>,
    headers: Vec<([u8; HEADER_SIZE], PageRun)>,
    sent: Sent,
}

/// Why a parcel cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ParcelError {
    /// The pages do not exist.
    #[error(transparent)]
    Pages(#[from] PageIoError),
    /// The zero pages' frame cannot be encoded.
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl Parcel {
    /// Looks at the pages of `run`, which has at most [`MAX_RUN`].
    pub fn new(io: &PageIo, run: PageRun) -> Result<Self, ParcelError> {
        let mut zero = Vec::new();
        let mut headers = Vec::new();
        let mut sent = Sent::default();
        for span in io.split_zero(run, MAX_RUN) {
            let span = span?;
            if span.is_zero {
                sent.zero += span.run.count;
                zero.push(span.run);
            } else {
                sent.normal += span.run.count;
                sent.bytes += wire_bytes(span.run);
                headers.push((Header::pages(span.run).encode(), span.run));
            }
        }
        let zero = if zero.is_empty() { None } else { Some(Frame::Zero(zero).encode()?) };
        sent.bytes += zero.as_ref().map_or(0, |frame| frame.len() as u64);
        Ok(Parcel { zero, headers, sent })
    }

    /// Sends it, contents straight from guest RAM, with one call as far as the connection takes it.
    pub fn send(&self, io: &PageIo, writer: &mut Writer, deadline: Option<Instant>) -> Result<Sent, PageIoError> {
        let pieces: Vec<Piece<'_>> = self
            .zero
            .iter()
            .map(|frame| Piece::Bytes(frame))
            .chain(self.headers.iter().flat_map(|(header, run)| [Piece::Bytes(header), Piece::Pages(*run)]))
            .collect();
        let begin = Instant::now();
        io.send(&pieces, writer, deadline)?;
        Ok(Sent { busy: begin.elapsed().max(Duration::from_nanos(1)), ..self.sent })
    }
}
