//! The source's connections, one pair after the other, and their readers.

use std::collections::VecDeque;
use std::time::Duration;

use ferry::migrate::source::{self, Sent, Source};
use ferry::migrate::wire::{Channel, Frame};

use super::World;
use super::source::PageSender;
use crate::link::Connection;
use crate::memory::Version;

/// Inputs that readers may be ahead by.
const INPUTS: usize = 16;
/// Steps for which the end of the destination's words is waited for.
const CLOSE_STEPS: u64 = 2000;

impl World {
    fn connect(&mut self, channel: Channel) -> Option<usize> {
        if !self.is_listening() {
            let reason = "connection refused".into();
            self.source.engine.handle(source::Input::Failed(reason), self.now);
            return None;
        }
        self.connections.push(Connection::new(channel));
        Some(self.connections.len() - 1)
    }

    pub(super) fn source_opens_main(&mut self) {
        self.source.main = self.connect(Channel::Main);
        self.source.main_reader = self.source.main;
    }

    pub(super) fn source_opens_others(&mut self) {
        self.source.urgent = self.connect_and_greet(Channel::Urgent);
        for index in 0..self.plan.page_channels {
            if let Some(connection) = self.connect_and_greet(Channel::Pages(index)) {
                self.source.pages.push(PageSender { connection, batches: VecDeque::new() });
            }
        }
    }

    fn connect_and_greet(&mut self, channel: Channel) -> Option<usize> {
        let connection = self.connect(channel)?;
        let hello = Source::hello(42, self.source.engine.link(), channel);
        self.connections[connection].to_destination.send(hello, Vec::new());
        Some(connection)
    }

    /// Sends on the main connection, if there is one.
    pub(super) fn source_says(&mut self, frame: Frame, contents: Vec<Version>) {
        let Some(main) = self.source.main else { return };
        self.may_lose(main, frame.kind());
        self.connections[main].to_destination.send(frame, contents);
    }

    /// Closes all connections; what their readers have reported is heard no more.
    pub(super) fn source_disconnects(&mut self) {
        self.source.inputs.clear();
        self.source.main = None;
        let for_pages = self.source.pages.drain(..).map(|sender| sender.connection);
        let all: Vec<usize> = [self.source.main_reader.take(), self.source.urgent.take()].into_iter().flatten().chain(for_pages).collect();
        for connection in all {
            self.source_closes(connection);
        }
    }

    /// What is under way may be destroyed if something from the destination was not read.
    fn source_closes(&mut self, connection: usize) {
        let keep = [usize::MAX, 0, 2][self.choices.below(3) as usize];
        self.connections[connection].to_destination.cut(keep, self.step);
        self.connections[connection].to_source.cut(0, u64::MAX);
    }

    pub(super) fn source_reads_main(&mut self) {
        let Some(main) = self.source.main_reader.filter(|_| self.source.alive) else { return };
        let pipe = &mut self.connections[main].to_source;
        if self.source.inputs.len() >= INPUTS || !pipe.is_ready(self.step) {
            return;
        }
        let input = match pipe.receive() {
            Some(message) => source::Input::Frame(message.frame),
            None => {
                self.source.main_reader = None;
                source::Input::Lost(Channel::Main, "cut".into())
            }
        };
        self.source.inputs.push_back(input);
    }

    /// Answers one request from the urgent connection, whose end ends its thread and closes it.
    pub(super) fn source_serves_requests(&mut self) {
        let Some(urgent) = self.source.urgent.filter(|_| self.source.alive) else { return };
        let pipe = &mut self.connections[urgent].to_source;
        let is_ready = pipe.is_ready(self.step);
        // One thing at a time: more may have come before the next.
        if (!is_ready || self.choices.chance(50))
            && let Some(run) = self.source.engine.next_requested()
        {
            let contents = run.pages().map(|page| self.source.ram.read(page)).collect();
            self.connections[urgent].to_destination.pages(run, contents);
            let busy = Duration::from_micros(run.count * 2);
            return self.source.engine.sent_urgent(Sent { normal: run.count, bytes: run.bytes(), busy, ..Sent::default() });
        }
        if !is_ready {
            return;
        }
        let input = match pipe.receive().map(|message| message.frame) {
            Some(Frame::Request(run)) => match self.source.engine.request(run) {
                Ok(()) => return,
                Err(reason) => source::Input::Failed(reason),
            },
            Some(frame) => source::Input::Lost(Channel::Urgent, format!("{frame:?} does not belong here")),
            None => source::Input::Lost(Channel::Urgent, "cut".into()),
        };
        self.source.urgent = None;
        self.source_closes(urgent);
        self.source.inputs.push_back(input);
    }

    /// Says that nothing follows, and waits for the destination's end.
    pub(super) fn source_begins_to_end(&mut self, outcome: Box<source::Outcome>) {
        let until = match self.source.main.take() {
            Some(main) if self.source.main_reader.is_some() => {
                self.connections[main].to_destination.close();
                self.step + CLOSE_STEPS
            }
            _ => self.step,
        };
        self.source.ending = Some((outcome, until));
    }

    pub(super) fn source_ends(&mut self) {
        self.source.inputs.clear();
        let Some((outcome, until)) = self.source.ending.take() else { return };
        if self.source.main_reader.is_some() && self.step < until {
            self.source.ending = Some((outcome, until));
            return;
        }
        self.source_disconnects();
        if self.source.engine.may_be_waited_for() {
            self.settle();
        }
        self.source.outcome = Some(*outcome);
    }

    /// Tells a destination that may have said READY that the guest was not given up, if it can be reached.
    fn settle(&mut self) {
        if !self.is_listening() || self.choices.chance(15) {
            return self.say("source: cannot settle");
        }
        self.say("source: settles");
        let mut connection = Connection::new(Channel::Main);
        let link = self.source.engine.link() + 1;
        connection.to_destination.send(Source::hello(42, link, Channel::Main), Vec::new());
        connection.to_destination.send(Frame::Abort("the guest goes on at the source".into()), Vec::new());
        connection.to_destination.close();
        if self.choices.chance(15) {
            connection.to_destination.cut(1, self.step);
        }
        self.connections.push(connection);
    }
}
