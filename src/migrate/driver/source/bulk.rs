//! Pages in the background: how they are packed into frames, and the threads that send them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};

use super::super::block_io::{BlockIo, BlockIoError, split_zero};
use super::super::page_io::{PageIo, PageIoError, Piece};
use super::super::scheduling;
use super::Shared;
use super::links::wire_bytes;
use crate::memory::{HostPage, PAGE_SIZE, PageRun};
use crate::migrate::compression::{Compressor, Payoff};
use crate::migrate::source::{Input, Sent};
use crate::migrate::transport::Writer;
use crate::migrate::wire::{Channel, Compressed, Frame, HEADER_SIZE, Header, MAX_RUN, WireError};

/// Pages that are to go out on one connection, at most [`MAX_RUN`].
#[derive(Debug)]
pub struct Batch {
    pub runs: Vec<PageRun>,
    /// So many neighbouring pages go alike.
    pub unit: HostPage,
    /// What was counted against a limit for it: against that of the time after the commit, or before, so many bytes.
    pub charged: Option<(bool, u64)>,
    /// Until when, if there is a time limit.
    pub deadline: Option<Instant>,
}

/// Why pages cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum BulkError {
    /// They cannot be read, or the connection failed.
    #[error(transparent)]
    Pages(#[from] PageIoError),
    /// Blocks cannot be read.
    #[error(transparent)]
    Blocks(#[from] BlockIoError),
    /// A frame cannot be encoded.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Part of what goes out.
enum Part {
    /// A header, and the pages whose contents follow it straight from guest RAM.
    Pages([u8; HEADER_SIZE], PageRun),
    /// A whole frame.
    Frame(Vec<u8>),
}

/// One connection for pages.
pub struct PageSender {
    shared: Arc<Shared>,
    io: PageIo,
    blocks: BlockIo,
    channel: Channel,
    writer: Writer,
    is_paced: bool,
    compressor: Option<Compressor>,
    payoff: Payoff,
    /// A copy of the pages to compress, which the guest may be writing, or of blocks.
    copy: Vec<u8>,
}

impl PageSender {
    pub fn new(shared: Arc<Shared>, io: PageIo, blocks: BlockIo, channel: Channel, writer: Writer) -> Self {
        let compressor = shared.pages.compression.and_then(Compressor::new);
        PageSender { shared, io, blocks, channel, writer, is_paced: true, compressor, payoff: Payoff::default(), copy: Vec::new() }
    }

    /// Sends what comes until nothing more does; a failure is reported and ends it.
    pub fn run(mut self, batches: &Receiver<Batch>, inputs: &Sender<Input>) {
        scheduling::is_bulk();
        for batch in batches {
            let (is_over, is_committed) = {
                let engine = self.shared.engine();
                (engine.is_over(), engine.is_committed())
            };
            // A migration that is over needs nothing of this, and counts nothing.
            if is_over {
                continue;
            }
            // After the commit a guest that waits for pages may share the processors: it matters more than how soon all have come.
            self.set_paced(is_committed);
            match self.send(&batch) {
                Ok(sent) => self.account(sent, batch.charged),
                Err(error) => {
                    let input = match error {
                        BulkError::Blocks(error) => Input::Failed(error.to_string()),
                        error => Input::Lost(self.channel, error.to_string()),
                    };
                    // Fails when the link is closed.
                    let _ = inputs.send(input);
                    return;
                }
            }
        }
    }

    fn set_paced(&mut self, is_paced: bool) {
        if self.is_paced != is_paced {
            self.writer.set_paced(is_paced);
            self.is_paced = is_paced;
        }
    }

    fn send(&mut self, batch: &Batch) -> Result<Sent, BulkError> {
        let begin = Instant::now();
        let compress = self.compressor.is_some() && self.payoff.is_to_compress();
        let (parts, sent) = self.pack(batch, compress)?;
        let looked = Instant::now();
        let mut pieces = Vec::with_capacity(2 * parts.len());
        for part in &parts {
            match part {
                Part::Pages(header, run) => pieces.extend([Piece::Bytes(header), Piece::Pages(*run)]),
                Part::Frame(frame) => pieces.push(Piece::Bytes(frame)),
            }
        }
        self.io.send(&pieces, &mut self.writer, batch.deadline)?;
        // Time for compressing is part of what the pages cost; for looking at them it is not, as the link need not wait for that.
        let busy = (if compress { begin } else { looked }).elapsed().max(Duration::from_nanos(1));
        if self.compressor.is_some() && sent.normal > 0 {
            let seconds = busy.as_secs_f64().max(self.shared.seconds_by_pace(sent.bytes));
            self.payoff.observe(compress, sent.normal * PAGE_SIZE as u64, seconds);
        }
        Ok(Sent { busy, ..sent })
    }

    /// Looks at the pages of `batch`: those that are zero go by name, all others with their contents, straight from guest RAM unless they are
    /// compressed.
    fn pack(&mut self, batch: &Batch, compress: bool) -> Result<(Vec<Part>, Sent), BulkError> {
        let (mut parts, mut zero, mut sent) = (Vec::new(), Vec::new(), Sent::default());
        for run in &batch.runs {
            if self.blocks.blocks(*run).is_some() {
                self.pack_blocks(*run, compress, &mut parts, &mut zero, &mut sent)?;
                continue;
            }
            for span in self.io.split_zero(*run, MAX_RUN, batch.unit) {
                let span = span?;
                if span.is_zero && self.shared.pages.zero_page_detection {
                    sent.zero += span.run.count;
                    zero.push(span.run);
                    continue;
                }
                sent.normal += span.run.count;
                let compressor = self.compressor.as_mut().filter(|_| compress);
                match compressor.map(|compressor| compressed(&self.io, span.run, compressor, &mut self.copy)).transpose()?.flatten() {
                    Some(frame) => {
                        sent.compressed += span.run.count;
                        sent.saved += wire_bytes(span.run).saturating_sub(frame.len() as u64);
                        sent.bytes += frame.len() as u64;
                        parts.push(Part::Frame(frame));
                    }
                    None => {
                        sent.bytes += wire_bytes(span.run);
                        parts.push(Part::Pages(Header::pages(span.run).encode(), span.run));
                    }
                }
            }
        }
        if !zero.is_empty() {
            let frame = Frame::Zero(zero).encode()?;
            sent.bytes += frame.len() as u64;
            parts.push(Part::Frame(frame));
        }
        Ok((parts, sent))
    }

    /// The same for blocks of a disk, whose contents are a copy in any case.
    fn pack_blocks(
        &mut self,
        run: PageRun,
        compress: bool,
        parts: &mut Vec<Part>,
        zero: &mut Vec<PageRun>,
        sent: &mut Sent,
    ) -> Result<(), BulkError> {
        sent.blocks = true;
        self.blocks.read(run, &mut self.copy)?;
        let mut rest = self.copy.as_slice();
        for span in split_zero(run, &self.copy) {
            let (contents, after) = rest.split_at_checked(span.run.bytes() as usize).unwrap_or_default();
            rest = after;
            if span.is_zero {
                sent.zero += span.run.count;
                zero.push(span.run);
                continue;
            }
            sent.normal += span.run.count;
            let compressor = self.compressor.as_mut().filter(|_| compress);
            let frame = match compressor.map(|compressor| compressed_frame(span.run, compressor, contents)).transpose()?.flatten() {
                Some(frame) => {
                    sent.compressed += span.run.count;
                    sent.saved += wire_bytes(span.run).saturating_sub(frame.len() as u64);
                    frame
                }
                None => [&Header::pages(span.run).encode(), contents].concat(),
            };
            sent.bytes += frame.len() as u64;
            parts.push(Part::Frame(frame));
        }
        Ok(())
    }

    fn account(&self, sent: Sent, charged: Option<(bool, u64)>) {
        let refund = charged.map_or(0, |(committed, bytes)| {
            let refund = bytes.saturating_sub(sent.bytes);
            self.shared.pace(committed).refund(refund);
            refund
        });
        if self.shared.engine().sent(self.channel, sent) || refund > 0 {
            self.shared.wake();
        }
    }
}

/// The frame with the compressed contents of `run`, if it is shorter than they are.
fn compressed(io: &PageIo, run: PageRun, compressor: &mut Compressor, copy: &mut Vec<u8>) -> Result<Option<Vec<u8>>, BulkError> {
    copy.clear();
    io.copy(run, copy)?;
    compressed_frame(run, compressor, copy)
}

fn compressed_frame(run: PageRun, compressor: &mut Compressor, contents: &[u8]) -> Result<Option<Vec<u8>>, BulkError> {
    let method = compressor.method();
    let Some(compressed) = compressor.compress(contents) else { return Ok(None) };
    let frame = Frame::Compressed(Compressed { run, method, contents: compressed.to_vec() }).encode()?;
    Ok((frame.len() < HEADER_SIZE + contents.len()).then_some(frame))
}
