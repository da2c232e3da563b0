//! The source's readers: what the destination says, and what it asks for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::super::block_io::BlockIo;
use super::super::frames::{self, FrameError};
use super::super::page_io::{PageIo, Piece};
use super::super::scheduling;
use super::Shared;
use super::block_reader::BlockReader;
use crate::memory::{PAGE_SIZE, PageRun};
use crate::migrate::source::{Input, Sent, Source};
use crate::migrate::transport::{Address, Awaited, Interrupt, LinkError, Reader, Writer, connect};
use crate::migrate::wire::{Channel, Frame, HEADER_SIZE, Header, Kind};

/// How long a destination is given to hear that the guest was not given up.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Passes on what comes on the main connection until it ends, its end last.
pub fn read_main(mut reader: Reader, pages: u64, inputs: &Sender<Input>) {
    scheduling::is_prompt();
    loop {
        let next = reader.await_next().map_err(FrameError::from);
        let input = match next.and_then(|()| frames::read(&mut reader, frames::from_destination(pages), None)) {
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
    scheduling::is_prompt();
    let disks = blocks.layout().has_disks().then(|| BlockReader::start(blocks.clone())).transpose();
    let served = disks.and_then(|disks| {
        let mut requests = Requests { shared, io, blocks, disks, reader, writer };
        loop {
            requests.serve()?;
        }
    });
    let Err::<std::convert::Infallible, _>(input) = served;
    // Fails when the migration is over.
    let _ = inputs.send(input);
}

/// The urgent connection.
struct Requests<'a> {
    shared: &'a Shared,
    io: &'a PageIo,
    blocks: &'a BlockIo,
    /// Where disks are copied.
    disks: Option<BlockReader>,
    reader: Reader,
    writer: Writer,
}

impl Requests<'_> {
    /// Does what is most urgent: sends pages that were asked for, reads what has come, sends blocks that have been read, waits.
    fn serve(&mut self) -> Result<(), Input> {
        let next = self.shared.engine().next_requested();
        if let Some(run) = next {
            return match &self.disks {
                Some(disks) if self.blocks.blocks(run).is_some() => {
                    disks.ask(run);
                    Ok(())
                }
                _ => self.send(run, Piece::Pages(run), false),
            };
        }
        let Some(disks) = &self.disks else {
            self.reader.await_next().map_err(lost)?;
            return self.read();
        };
        if !self.reader.has_more().map_err(lost)?
            && let Some(read) = disks.next()
        {
            let (run, contents) = read?;
            return self.send(run, Piece::Bytes(&contents), true);
        }
        match self.reader.wait(&disks.news, None).map_err(lost)? {
            Awaited::Readable => self.read(),
            Awaited::Woken | Awaited::TimedOut => Ok(()),
        }
    }

    fn send(&mut self, run: PageRun, contents: Piece<'_>, blocks: bool) -> Result<(), Input> {
        let begin = Instant::now();
        let sent = self.io.send(&[Piece::Bytes(&Header::pages(run).encode()), contents], &mut self.writer, None);
        sent.map_err(|error| Input::Lost(Channel::Urgent, error.to_string()))?;
        let (normal, bytes) = (run.count, wire_bytes(run));
        self.shared.engine().sent_urgent(Sent { normal, bytes, blocks, busy: begin.elapsed(), ..Sent::default() });
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

fn lost(error: LinkError) -> Input {
    Input::Lost(Channel::Urgent, error.to_string())
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
