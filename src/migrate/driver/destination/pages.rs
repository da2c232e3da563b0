//! Pages that come, on the urgent connection and those for pages: read, and put where they belong.

use std::sync::Arc;
use std::time::Instant;

use super::super::block_io::BlockIo;
use super::super::frames::{self, FRAME_TIMEOUT, FrameError};
use super::super::page_io::PageIo;
use super::super::scheduling;
use super::Shared;
use super::faults::FaultService;
use super::urgent_blocks::UrgentBlocks;
use crate::memory::PageRun;
use crate::migrate::compression::Decompressor;
use crate::migrate::destination::{Input, Link, Placement};
use crate::migrate::staging::Gathered;
use crate::migrate::transport::Reader;
use crate::migrate::wire::{Channel, Compressed, Frame, Header, Kind, Totals};

/// Receives pages until the connection ends.
pub fn receive(shared: &Arc<Shared>, link: Link, channel: Channel, reader: Reader) {
    if channel == Channel::Urgent {
        scheduling::is_prompt();
    } else {
        scheduling::is_bulk();
    }
    let (contents, decompressor) = (Vec::new(), Decompressor::default());
    let mut pages = PageReader { shared, link, channel, reader, contents, decompressor, urgent_blocks: None };
    let end = loop {
        match pages.receive() {
            // For each page that comes alone, waking a thread would take longer than placing it.
            Ok(()) if shared.engine().has_news() => shared.wake.wake(),
            Ok(()) => {}
            Err(end) => break end,
        }
    };
    shared.handle(end);
}

/// A connection that brings pages.
struct PageReader<'a> {
    shared: &'a Arc<Shared>,
    link: Link,
    channel: Channel,
    reader: Reader,
    /// What is to be placed whole.
    contents: Vec<u8>,
    decompressor: Decompressor,
    /// Once some have come.
    urgent_blocks: Option<UrgentBlocks>,
}

impl PageReader<'_> {
    /// Reads one frame and does what it says. An error is what to tell the engine.
    fn receive(&mut self) -> Result<(), Input> {
        let is_urgent = self.channel == Channel::Urgent;
        if is_urgent {
            self.reader.await_next().map_err(|error| self.lost(error))?;
        }
        let allowed = |header: Header| match header.kind {
            Kind::Pages => true,
            Kind::Zero | Kind::Compressed => !is_urgent,
            _ => false,
        };
        match frames::read(&mut self.reader, allowed, None) {
            Ok(Frame::Pages(run)) => self.pages(run),
            Ok(Frame::Zero(runs)) => self.zero(&runs),
            Ok(Frame::Compressed(compressed)) => self.compressed(&compressed),
            Ok(frame) => Err(Input::Frame(self.link, self.channel, frame)),
            Err(error @ (FrameError::Wire(_) | FrameError::OutOfPlace { .. })) => {
                Err(self.nonsense(format!("the source's stream makes no sense: {error}")))
            }
            Err(error) => Err(self.lost(error)),
        }
    }

    fn lost(&self, error: impl ToString) -> Input {
        Input::Lost(self.link, self.channel, error.to_string())
    }

    fn nonsense(&self, reason: String) -> Input {
        Input::Nonsense(self.link, reason)
    }

    fn pages(&mut self, run: PageRun) -> Result<(), Input> {
        let deadline = Some(Instant::now() + FRAME_TIMEOUT);
        let placement = self.shared.engine().pages(self.channel, run).map_err(|reason| self.nonsense(reason))?;
        let (ram, blocks) = io(self.shared)?;
        let is_blocks = blocks.blocks(run).is_some();
        if placement == Placement::Direct && !is_blocks {
            ram.receive(run, &mut self.reader, deadline).map_err(|error| self.lost(error))?;
            self.received(Totals { normal: run.count, zero: 0 });
            return Ok(());
        }
        if placement == Placement::Staged {
            let faults = self.faults()?;
            let read = faults.staging()?.receive(run, &mut self.reader, deadline);
            self.shared.engine().staged(run, read.is_ok(), self.shared.now());
            // Also after a loss: others may have waited for nothing but the end of this.
            self.place_gathered()?;
            return read.map_err(|error| self.lost(error));
        }
        // Bounded by the engine.
        self.contents.resize(run.bytes() as usize, 0);
        let read = self.reader.read_exact(&mut self.contents, deadline);
        read.map_err(|error| self.lost(error))?;
        if self.channel == Channel::Urgent && is_blocks {
            let urgent = match self.urgent_blocks.take() {
                Some(urgent) => urgent,
                None => UrgentBlocks::start(self.shared, blocks)?,
            };
            self.urgent_blocks.insert(urgent).place(run, std::mem::take(&mut self.contents));
            return Ok(());
        }
        self.put(run, placement, &ram, &blocks)
    }

    fn compressed(&mut self, compressed: &Compressed) -> Result<(), Input> {
        let run = compressed.run;
        // Bounded by the frame's decoding. Before the engine counts on them.
        self.contents.resize(run.bytes() as usize, 0);
        self.decompressor
            .decompress(compressed.method, &compressed.contents, &mut self.contents)
            .map_err(|error| self.nonsense(format!("{run} came, but {error}")))?;
        let placement = self.shared.engine().pages(self.channel, run).map_err(|reason| self.nonsense(reason))?;
        let (ram, blocks) = io(self.shared)?;
        self.put(run, placement, &ram, &blocks)
    }

    /// Puts `contents` in their place.
    fn put(&self, run: PageRun, placement: Placement, ram: &PageIo, blocks: &BlockIo) -> Result<(), Input> {
        match (blocks.blocks(run), placement) {
            (Some(_), _) => blocks.place(run, Some(&self.contents)).map_err(failed)?,
            (None, Placement::Fault) => self.faults()?.pages.place(run, &self.contents).map(drop).map_err(failed)?,
            (None, Placement::Direct) => ram.write(run, &self.contents).map_err(failed)?,
            (None, Placement::Staged) => {
                let written = self.faults()?.staging()?.write(run, &self.contents);
                self.shared.engine().staged(run, written.is_ok(), self.shared.now());
                written.map_err(failed)?;
            }
        }
        match placement {
            Placement::Direct => self.received(Totals { normal: run.count, zero: 0 }),
            Placement::Fault => self.placed(run),
            Placement::Staged => {}
        }
        self.place_gathered()
    }

    /// Only now are they no longer missing.
    fn placed(&self, run: PageRun) {
        self.shared.engine().placed(run, self.shared.now());
    }

    /// Puts huge pages in place that have come together.
    fn place_gathered(&self) -> Result<(), Input> {
        loop {
            let Some(gathered) = self.shared.engine().take_gathered() else { return Ok(()) };
            let pages = &self.faults()?.pages;
            match gathered {
                Gathered::Contents(run) => self.faults()?.replace(run).map(|()| run),
                Gathered::Zero(run) => pages.place_zero(run).map(|_| run),
            }
            .map(|run| self.shared.engine().replaced(run, self.shared.now()))
            .map_err(failed)?;
        }
    }

    fn zero(&mut self, runs: &[PageRun]) -> Result<(), Input> {
        let (placement, to_do) = self.shared.engine().zero(self.channel, runs).map_err(|reason| self.nonsense(reason))?;
        let (ram, blocks) = io(self.shared)?;
        for run in to_do {
            match (blocks.blocks(run), placement) {
                (Some(_), _) => blocks.place(run, None).map_err(failed)?,
                (None, Placement::Fault) => self.faults()?.pages.place_zero(run).map(drop).map_err(failed)?,
                (None, Placement::Direct) => ram.discard(run).map_err(failed)?,
                // Zeros are there before anything comes.
                (None, Placement::Staged) => {}
            }
            if placement == Placement::Fault {
                self.placed(run);
            }
        }
        if placement == Placement::Direct {
            self.received(Totals { normal: 0, zero: runs.iter().map(|run| run.count).sum() });
        }
        self.place_gathered()
    }

    fn received(&self, pages: Totals) {
        self.shared.engine().received(pages);
    }

    fn faults(&self) -> Result<&FaultService, Input> {
        self.shared.faults.get().ok_or_else(|| Input::Failed("pages came before the guest".into()))
    }
}

/// For one frame: nothing here keeps the RAM of a migration that is over.
fn io(shared: &Shared) -> Result<(PageIo, BlockIo), Input> {
    shared.io().clone().ok_or_else(|| Input::Failed("pages came before there was RAM".into()))
}

fn failed(error: impl ToString) -> Input {
    Input::Failed(error.to_string())
}
