//! Connections: ordered, delayed by whoever schedules the reader, and cut at any time.

use std::collections::VecDeque;

use ferry::memory::PageRun;
use ferry::migrate::wire::{Channel, Frame, HEADER_SIZE, Header};

use crate::memory::Version;

/// What travels: a frame, with the contents of its pages.
#[derive(Clone, Debug)]
pub struct Message {
    pub frame: Frame,
    pub contents: Vec<Version>,
}

/// One direction of one connection.
#[derive(Default)]
pub struct Pipe {
    queue: VecDeque<Message>,
    /// Nothing can be sent any more; the step from which the reader can know.
    end: Option<u64>,
    /// The reader knows.
    end_seen: bool,
}

impl Pipe {
    /// Sends; lost without notice where the connection is broken, as with TCP. Every frame goes through its encoding.
    pub fn send(&mut self, frame: Frame, contents: Vec<Version>) {
        if self.end.is_some() {
            return;
        }
        let bytes = frame.encode().expect("the engine sent a frame beyond the bounds");
        let header = Header::decode(bytes[..HEADER_SIZE].try_into().unwrap()).unwrap();
        let decoded = Frame::decode(header, &bytes[HEADER_SIZE..]).unwrap();
        assert_eq!(decoded, frame);
        self.queue.push_back(Message { frame: decoded, contents });
    }

    pub fn pages(&mut self, run: PageRun, contents: Vec<Version>) {
        self.send(Frame::Pages(run), contents);
    }

    /// The next message; nothing at the end, which is then seen.
    pub fn receive(&mut self) -> Option<Message> {
        let message = self.queue.pop_front();
        self.end_seen |= message.is_none();
        message
    }

    /// Whether there is a message, or the end of them, at this step.
    pub fn is_ready(&self, step: u64) -> bool {
        !self.queue.is_empty() || (self.end.is_some_and(|end| end <= step) && !self.end_seen)
    }

    /// Whether a sender finds it broken at this step.
    pub fn is_broken(&self, step: u64) -> bool {
        self.end.is_some_and(|end| end <= step)
    }

    pub fn has_messages(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Breaks this direction. Of what is under way the first `keep` still arrive; the reader knows from step `noticed` on.
    pub fn cut(&mut self, keep: usize, noticed: u64) {
        self.queue.truncate(keep);
        self.end = Some(self.end.map_or(noticed, |end| end.min(noticed)));
    }

    /// The sender ends it in good order.
    pub fn close(&mut self) {
        self.cut(usize::MAX, 0);
    }

    pub fn lose_one(&mut self) -> bool {
        self.queue.pop_front().is_some()
    }
}

/// A connection, opened by the source.
pub struct Connection {
    pub channel: Channel,
    pub to_destination: Pipe,
    pub to_source: Pipe,
    /// The destination has read what it is, or its end before that.
    pub greeted: bool,
}

impl Connection {
    pub fn new(channel: Channel) -> Self {
        Connection { channel, to_destination: Pipe::default(), to_source: Pipe::default(), greeted: false }
    }
}
