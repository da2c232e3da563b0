//! The destination's state machine with a hostile source. The driver around it always does what it is told.

use std::time::Duration;

use ferry::memory::{HostPage, PageNumber, PageRun};
use ferry::migrate::destination::{Action, Destination, Input, Link, Outcome, Placement, Poll};
use ferry::migrate::staging::Gathered;
use ferry::migrate::wire::{Channel, Compressed, Frame, Totals};

use super::allocation::{proportionate, within};
use super::session::{Step, steps};

/// What this host has, in pages: 4 GiB.
const HOST_PAGES: u64 = 1 << 20;

pub fn run(data: &[u8]) {
    // A package makes sets of the pages that the host agreed to; nothing else may cost more than its own length.
    let limit = proportionate(data.len()) + (HOST_PAGES / 8) as usize;
    within(limit, || Host::default().live(data));
}

#[derive(Default)]
struct Host {
    engine: Destination,
    now: Duration,
    link: Link,
    huge: Vec<PageRun>,
    /// Pages can be read to their end.
    is_read: bool,
    committed: bool,
    whole: bool,
    ended: bool,
}

impl Host {
    fn live(&mut self, data: &[u8]) {
        for step in steps(data) {
            match step {
                Step::Frame(channel, Frame::Hello(hello)) if channel == hello.channel => {
                    if let (Ok(link), Channel::Main) = (self.engine.hello(&hello, self.now), channel) {
                        self.link = link;
                    }
                }
                Step::Frame(channel, Frame::Pages(run) | Frame::Compressed(Compressed { run, .. })) => {
                    match self.engine.pages(channel, run) {
                        Ok(Placement::Fault) => self.engine.placed(run, self.now),
                        Ok(Placement::Staged) => self.engine.staged(run, self.is_read, self.now),
                        Ok(Placement::Direct) => self.engine.received(Totals { normal: run.count, zero: 0 }),
                        Err(reason) => self.engine.handle(Input::Failed(reason)),
                    }
                }
                Step::Frame(channel, Frame::Zero(runs)) => match self.engine.zero(channel, &runs) {
                    Ok((placement, to_do)) => {
                        assert!(to_do.iter().all(|run| run.is_within(HOST_PAGES)), "{to_do:?}");
                        match placement {
                            Placement::Fault | Placement::Staged => to_do.iter().for_each(|run| self.engine.placed(*run, self.now)),
                            Placement::Direct => self.engine.received(Totals { normal: 0, zero: runs.iter().map(|run| run.count).sum() }),
                        }
                    }
                    Err(reason) => self.engine.handle(Input::Failed(reason)),
                },
                Step::Frame(channel, frame) => self.engine.handle(Input::Frame(self.link, channel, frame)),
                Step::Lost(channel) => self.engine.handle(Input::Lost(self.link, channel, "cut".into())),
                Step::Wait(time) => self.now += time,
                Step::Local(byte @ 0..0x80) => {
                    self.engine.fault(PageNumber(byte.into()), self.now);
                    let storage = self.engine.layout().storage();
                    self.engine.wait_for_blocks(PageRun::new(storage.first.0 + u64::from(byte), 40), self.now);
                }
                Step::Local(0x80..0x88) => self.is_read = !self.is_read,
                Step::Local(byte) => self.engine.handle(match byte % 5 {
                    0 => Input::Failed("no".into()),
                    1 => Input::Warning("hm".into()),
                    2 => Input::GiveUp("enough".into()),
                    3 => Input::Pause,
                    _ => Input::GiveUpRest,
                }),
                Step::Poll(_) => {}
            }
            while let Some(Gathered::Contents(run) | Gathered::Zero(run)) = self.engine.take_gathered() {
                assert!(HostPage::HUGE.divides(run) && run.count == HostPage::HUGE.pages(), "{run}");
                self.engine.replaced(run, self.now);
            }
            while let Poll::Act(action) = self.engine.poll(self.now) {
                self.act(action);
            }
        }
    }

    fn act(&mut self, action: Action) {
        assert!(!self.ended, "{action:?} after the end");
        match action {
            Action::Send(_, frame) => drop(frame.encode().expect("what is sent can be encoded")),
            Action::Prepare(setup) if self.engine.layout().pages() <= HOST_PAGES => {
                self.huge = setup.huge;
                self.engine.handle(Input::Prepared);
            }
            Action::Prepare(_) => self.engine.handle(Input::Failed("too large".into())),
            Action::Load(package) => {
                assert!(package.postcopy || package.missing.is_empty());
                if package.postcopy {
                    self.engine.stage(HostPage::HUGE, &self.huge);
                }
                self.engine.handle(Input::Loaded { load_us: 1, warnings: Vec::new() });
            }
            Action::Run => {
                self.committed = true;
                self.engine.handle(Input::Ran(1));
            }
            Action::BeginBuilding | Action::FinishBuilding => {}
            Action::LoadBitmap { .. } | Action::CompleteBitmap(_) | Action::AbandonBitmaps => assert!(self.committed),
            Action::FlushDisks => self.engine.handle(Input::DisksFlushed),
            Action::Disconnect(_) | Action::Reconnect(_) => {}
            Action::Complete => {
                assert!(!self.whole && self.committed && self.engine.missing().is_empty(), "complete, but pages are missing");
                self.whole = true;
            }
            Action::End(outcome) => {
                self.ended = true;
                assert_eq!(outcome != Outcome::Completed, !self.committed, "{outcome:?}");
                assert_eq!(outcome == Outcome::Completed, self.whole, "{outcome:?}");
            }
        }
    }
}
