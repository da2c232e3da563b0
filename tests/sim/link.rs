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
    broken: bool,
    /// The reader was told that nothing more comes.
    pub end_seen: bool,
}

impl Pipe {
    /// Sends; lost without notice where the connection is broken, as with TCP. Every frame goes through its encoding.
    pub fn send(&mut self, frame: Frame, contents: Vec<Version>) {
        if self.broken {
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

    pub fn receive(&mut self) -> Option<Message> {
        self.queue.pop_front()
    }

    pub fn is_ready(&self) -> bool {
        !self.queue.is_empty() || (self.broken && !self.end_seen)
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Breaks the connection; what is under way may or may not still arrive.
    pub fn cut(&mut self, keep: usize) {
        self.queue.truncate(keep);
        self.broken = true;
    }

    pub fn lose_one(&mut self) -> bool {
        self.queue.pop_front().is_some()
    }
}

/// Both connections, both directions.
#[derive(Default)]
pub struct Link {
    pub to_destination: [Pipe; 2],
    pub to_source: [Pipe; 2],
}

pub const CHANNELS: [Channel; 2] = [Channel::Main, Channel::Urgent];

pub fn index(channel: Channel) -> usize {
    match channel {
        Channel::Main => 0,
        Channel::Urgent => 1,
    }
}
