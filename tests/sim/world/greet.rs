//! Connections that come to the destination, and the readers of those that bring pages.

use ferry::migrate::destination::{Input, Placement};
use ferry::migrate::wire::{Channel, Frame, Totals};

use super::World;
use super::destination::Session;
use super::placement::Placing;

impl World {
    /// One of the connections that have not said what they are says it; in no order.
    pub(super) fn destination_greets(&mut self) {
        if !self.destination.alive {
            return;
        }
        let step = self.step;
        let new = |connection: &crate::link::Connection| !connection.greeted && connection.to_destination.is_ready(step);
        let waiting: Vec<usize> = (0..self.connections.len()).filter(|index| new(&self.connections[*index])).collect();
        if waiting.is_empty() {
            return;
        }
        let index = waiting[self.choices.below(waiting.len() as u64) as usize];
        let connection = &mut self.connections[index];
        connection.greeted = true;
        let Some(Frame::Hello(hello)) = connection.to_destination.receive().map(|message| message.frame) else { return };
        if self.destination.outcome.is_some() {
            return connection.to_source.close();
        }
        let link = match self.destination.engine.hello(&hello, self.now) {
            Ok(link) => link,
            Err(reason) => {
                connection.to_source.send(Frame::Abort(reason.clone()), Vec::new());
                connection.to_source.close();
                return self.say(format!("destination: refuses {:?}: {reason}", hello.channel));
            }
        };
        self.say(format!("destination: {:?} of {link:?} is here", hello.channel));
        let destination = &mut self.destination;
        if hello.channel == Channel::Main {
            // A greeting from before a freeze counts for the engine, too.
            destination.heard_at = self.now;
        }
        if hello.channel != Channel::Main {
            if hello.channel == Channel::Urgent {
                destination.next_urgent = Some((link, index));
            }
            destination.readers.push((link, index));
            return;
        }
        destination.interrupted.extend(destination.current.replace(link));
        if destination.session.is_none() {
            destination.session = Some(Session { link, main: Some(index) });
        } else {
            destination.next_main = Some(index);
        }
    }

    /// One reader of a connection that brings pages reads one frame; a connection that was replaced may have one left before its reader
    /// knows.
    pub(super) fn destination_reads_pages(&mut self) {
        let destination = &mut self.destination;
        if !destination.alive || destination.readers.is_empty() {
            return;
        }
        let chosen = self.choices.below(destination.readers.len() as u64) as usize;
        let (link, index) = destination.readers[chosen];
        if destination.placing.iter().any(|placing| placing.reader == index) {
            // It places what it has read before it reads again.
            return;
        }
        let channel = self.connections[index].channel;
        let pipe = &mut self.connections[index].to_destination;
        let interrupted = destination.outcome.is_some() || destination.interrupted.contains(&link);
        let input = if interrupted && (!pipe.has_messages() || self.choices.chance(50)) {
            Input::Lost(link, channel, "interrupted".into())
        } else if !pipe.is_ready(self.step) {
            return;
        } else {
            match pipe.receive() {
                None => Input::Lost(link, channel, "cut".into()),
                Some(message) => {
                    let engine = &mut destination.engine;
                    let arrived = match message.frame {
                        Frame::Pages(run) => engine.pages(channel, run).map(|placement| Placing {
                            reader: index,
                            pages: Totals { normal: run.count, zero: 0 },
                            placement,
                            runs: vec![run],
                            contents: Some(message.contents),
                        }),
                        Frame::Zero(named) => engine.zero(channel, &named).map(|(placement, runs)| Placing {
                            reader: index,
                            pages: Totals { normal: 0, zero: named.iter().map(|run| run.count).sum() },
                            placement,
                            contents: Some(vec![0; runs.iter().map(|run| run.count).sum::<u64>() as usize]),
                            runs,
                        }),
                        frame => Err(format!("{frame:?} does not belong here")),
                    };
                    match arrived {
                        Ok(Placing { placement: Placement::Staged, runs, .. })
                            if !self.plan.faults.is_empty() && self.choices.chance(2) =>
                        {
                            // Cut in the middle of it.
                            runs.into_iter().for_each(|run| engine.staged(run, false, self.now));
                            Input::Lost(link, channel, "cut".into())
                        }
                        Ok(placing) => return destination.placing.push(placing),
                        Err(reason) => Input::Failed(reason),
                    }
                }
            }
        };
        destination.readers.remove(chosen);
        self.connections[index].to_source.cut(usize::MAX, self.step);
        destination.engine.handle(input);
        self.take_gathered();
    }
}
