//! The source's readers: what the destination says, and what it asks for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::super::frames;
use super::super::page_io::{PageIo, Piece};
use super::Shared;
use crate::memory::{PAGE_SIZE, PageRun};
use crate::migrate::source::{Input, Sent, Source};
use crate::migrate::transport::{Address, Interrupt, Reader, Writer, connect};
use crate::migrate::wire::{Channel, Frame, HEADER_SIZE, Header, Kind};

/// How long a destination is given to hear that the guest was not given up.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Passes on what comes on the main connection until it ends, its end last.
pub fn read_main(mut reader: Reader, ram_pages: u64, inputs: &Sender<Input>) {
    loop {
        let input = match frames::read(&mut reader, frames::from_destination(ram_pages), None) {
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

/// Answers page requests at once, from the guest's RAM, until the urgent connection ends.
pub fn serve_requests(shared: &Arc<Shared>, io: &PageIo, mut reader: Reader, mut writer: Writer, inputs: &Sender<Input>) {
    let input = loop {
        let run = match frames::read(&mut reader, |header| header.kind == Kind::Request, None) {
            Ok(Frame::Request(run)) => run,
            Ok(frame) => break Input::Failed(format!("the destination sent {:?} on the urgent connection", frame.kind())),
            Err(error) => break Input::Lost(Channel::Urgent, error.to_string()),
        };
        let allowed = shared.engine().request(run);
        if let Err(reason) = allowed {
            break Input::Failed(reason);
        }
        let begin = Instant::now();
        if let Err(error) = io.send(&[Piece::Bytes(&Header::pages(run).encode()), Piece::Pages(run)], &mut writer, None) {
            break Input::Lost(Channel::Urgent, error.to_string());
        }
        shared.engine().sent_urgent(Sent { normal: run.count, bytes: wire_bytes(run), busy: begin.elapsed(), ..Sent::default() });
    };
    // Fails when the migration is over.
    let _ = inputs.send(input);
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
