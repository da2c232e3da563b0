//! The source's readers: what the destination says, and what it asks for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::super::block_io::BlockIo;
use super::super::frames;
use super::super::page_io::{PageIo, Piece};
use super::Shared;
use crate::memory::{PAGE_SIZE, PageRun};
use crate::migrate::source::{Input, Sent, Source, Waiting};
use crate::migrate::transport::{Address, Interrupt, LinkError, Reader, Writer, connect};
use crate::migrate::wire::{Channel, Frame, HEADER_SIZE, Header, Kind};

/// How long a destination is given to hear that the guest was not given up.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Passes on what comes on the main connection until it ends, its end last.
pub fn read_main(mut reader: Reader, pages: u64, inputs: &Sender<Input>) {
    loop {
        let input = match frames::read(&mut reader, frames::from_destination(pages), None) {
            Ok(frame) => Input::Frame(frame),
            Err(error) => Input::Lost(Channel::Main, error.to_string()),
        };
        // Behind a `Pages` header no frame can be found again.
        let last = matches!(input, Input::Lost(..) | Input::Frame(Frame::Pages(_)));
        if inputs.send(input).is_err() || last {
            return;
        }
    }
}

/// Answers requests at once, from the guest's RAM and its disks, until the urgent connection ends.
pub fn serve_requests(shared: &Arc<Shared>, io: &PageIo, blocks: &BlockIo, reader: Reader, writer: Writer, inputs: &Sender<Input>) {
    let mut requests = Requests { shared, io, blocks, reader, writer, contents: Vec::new() };
    let input = loop {
        if let Err(input) = requests.serve() {
            break input;
        }
    };
    // Fails when the migration is over.
    let _ = inputs.send(input);
}

/// The urgent connection.
struct Requests<'a> {
    shared: &'a Shared,
    io: &'a PageIo,
    blocks: &'a BlockIo,
    reader: Reader,
    writer: Writer,
    /// Of blocks.
    contents: Vec<u8>,
}

impl Requests<'_> {
    /// Reads the request that comes next, where none is waiting or what has come already may be more urgent; otherwise answers one.
    fn serve(&mut self) -> Result<(), Input> {
        let waiting = self.shared.engine().requested();
        let lost = |error: LinkError| Input::Lost(Channel::Urgent, error.to_string());
        if waiting == Waiting::Nothing || (waiting == Waiting::Blocks && self.reader.has_more().map_err(lost)?) {
            return self.read();
        }
        let Some(run) = self.shared.engine().next_requested() else { return Ok(()) };
        let begin = Instant::now();
        let header = Header::pages(run).encode();
        let is_blocks = self.blocks.blocks(run).is_some();
        let contents = if is_blocks {
            self.blocks.read(run, &mut self.contents).map_err(|error| Input::Failed(error.to_string()))?;
            Piece::Bytes(&self.contents)
        } else {
            Piece::Pages(run)
        };
        let sent = self.io.send(&[Piece::Bytes(&header), contents], &mut self.writer, None);
        sent.map_err(|error| Input::Lost(Channel::Urgent, error.to_string()))?;
        let (normal, bytes) = (run.count, wire_bytes(run));
        self.shared.engine().sent_urgent(Sent { normal, bytes, blocks: is_blocks, busy: begin.elapsed(), ..Sent::default() });
        Ok(())
    }

    fn read(&mut self) -> Result<(), Input> {
        match frames::read(&mut self.reader, |header| header.kind == Kind::Request, None) {
            Ok(Frame::Request(run)) => self.shared.engine().request(run).map_err(Input::Failed),
            Ok(frame) => Err(Input::Failed(format!("the destination sent {:?} on the urgent connection", frame.kind()))),
            Err(error) => Err(Input::Lost(Channel::Urgent, error.to_string())),
        }
    }
}

/// Watches a connection for pages until it ends. The destination says nothing there, unless it refuses it.
pub fn watch(channel: Channel, mut reader: Reader, inputs: &Sender<Input>) {
    let reason = match frames::read(&mut reader, |header| header.kind == Kind::Abort, None) {
        Ok(Frame::Abort(reason)) => format!("the destination says: {reason}"),
        Ok(frame) => format!("the destination sent {:?} on the {channel:?} connection", frame.kind()),
        Err(error) => error.to_string(),
    };
    // Fails when the migration is over.
    let _ = inputs.send(Input::Lost(channel, reason));
}

/// The link was lost in the switch, and the guest goes on here. The destination may have said READY and cannot know: it is told on a new
/// connection, if it can be reached; otherwise a person ends it.
pub fn settle(shared: &Shared, address: &Address) {
    let deadline = Some(Instant::now() + SETTLE_TIMEOUT);
    // The cancel may be what has broken the link.
    let Ok(interrupt) = Interrupt::new() else { return };
    let Ok(connection) = connect(address, &interrupt, deadline) else { return };
    let (mut reader, mut writer) = connection.split();
    let link = shared.engine().link() + 1;
    let words = [
        Source::hello(shared.session, link, Channel::Main),
        Frame::Abort("the link was lost in the switch; the guest goes on at the source".into()),
    ];
    if words.iter().all(|frame| frames::send(&mut writer, frame, deadline).is_ok()) && writer.finish().is_ok() {
        let mut rest = [0; 4096];
        while reader.read_exact(&mut rest, deadline).is_ok() {}
    }
}

/// Bytes that the contents of `run` take on the wire.
pub fn wire_bytes(run: PageRun) -> u64 {
    HEADER_SIZE as u64 + run.count * PAGE_SIZE as u64
}
