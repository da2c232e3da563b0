//! The source's state machine with a hostile destination. The first byte chooses the mode and the host page; the driver does what it is told, step by step.

use std::time::Duration;

use ferry::memory::{HostPage, PageRun, PageSet};
use ferry::migrate::bitmaps::IncomingBitmaps;
use ferry::migrate::layout::Layout;
use ferry::migrate::report::Mode;
use ferry::migrate::source::{Action, Bulk, Config, Input, Outcome, Poll, Sent, Source, Stopped};
use ferry::migrate::wire::{BitmapFlags, BitmapInfo, BitmapPlace, Channel, Frame};

use super::allocation::{proportionate, within};
use super::session::{Step, steps};

/// RAM, a gap as large, and a disk.
const PAGES: u64 = 1024 + 300;
const RAM_PAGES: u64 = 512;

pub fn run(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let mode = [Mode::Auto, Mode::Precopy, Mode::Postcopy][usize::from(choice % 3)];
    let downtime_limit = Duration::from_millis(50);
    let host_page = if choice < 128 { HostPage::SMALL } else { HostPage::HUGE };
    let Ok(layout) = Layout::new(RAM_PAGES, host_page, &[0, PAGES - 2 * RAM_PAGES]) else { return };
    let config = Config { mode, downtime_limit, layout, page_channels: 2, session: 1, machine: vec![1; 10] };
    let engine = Source::new(config);
    let (now, bitmaps) = (Duration::ZERO, IncomingBitmaps::default());
    let mut host = Host { engine, now, stopped: false, given_up: false, connected: false, ended: false, bitmaps, infos: Vec::new() };
    within(proportionate(data.len()), || host.live(data));
}

struct Host {
    engine: Source,
    now: Duration,
    stopped: bool,
    given_up: bool,
    connected: bool,
    ended: bool,
    /// How the destination accounts for bitmaps.
    bitmaps: IncomingBitmaps,
    infos: Vec<BitmapInfo>,
}

impl Host {
    fn live(&mut self, data: &[u8]) {
        for step in steps(data) {
            match step {
                Step::Frame(Channel::Main, Frame::Holding(holding)) => {
                    self.go_to(holding.bitmaps);
                    self.engine.handle(Input::Frame(Frame::Holding(holding)), self.now);
                }
                Step::Frame(Channel::Main, frame) => self.engine.handle(Input::Frame(frame), self.now),
                Step::Frame(Channel::Urgent, Frame::Request(run)) => match self.engine.request(run) {
                    Ok(()) => {
                        while let Some(run) = self.engine.next_requested() {
                            self.engine.sent_urgent(sent(run));
                        }
                    }
                    Err(reason) => self.engine.handle(Input::Lost(Channel::Urgent, reason), self.now),
                },
                Step::Frame(Channel::Urgent, frame) => {
                    self.engine.handle(Input::Lost(Channel::Urgent, format!("{:?}", frame.kind())), self.now);
                }
                Step::Frame(channel @ Channel::Pages(_), frame) => {
                    self.engine.handle(Input::Lost(channel, format!("{:?}", frame.kind())), self.now);
                }
                Step::Lost(channel) => self.engine.handle(Input::Lost(channel, "cut".into()), self.now),
                Step::Wait(time) => self.now += time,
                Step::Local(byte) => {
                    let input = match byte {
                        128..192 => Input::PauseBeforeSwitchover(byte % 2 == 0),
                        192.. => Input::Continue,
                        _ => match byte % 7 {
                            0 => Input::Cancel,
                            1 => Input::StartPostcopy,
                            2 => Input::DowntimeLimit(Duration::from_millis(byte.into())),
                            3 => Input::Recover,
                            4 => Input::Pause,
                            5 => Input::GuestEnded("it powered off".into()),
                            _ => Input::Failed("no".into()),
                        },
                    };
                    self.engine.handle(input, self.now);
                }
                Step::Poll(times) => self.poll(times.into()),
            }
            let _ = self.engine.progress(self.now);
        }
        self.poll(100_000);
        assert!(matches!(self.engine.poll(self.now), Poll::Wait(_)), "it never waits");
    }

    /// The bitmaps have come as far as `place`; if there is no such place, the engine pauses and sends no more of them.
    fn go_to(&mut self, place: BitmapPlace) {
        self.bitmaps = IncomingBitmaps::new(&self.infos);
        for (index, info) in (0..place.index).zip(&self.infos) {
            self.bitmaps.words(index, 0, info.words()).and_then(|()| self.bitmaps.complete(index)).expect("all words");
        }
        let _ = self.bitmaps.words(place.index, 0, place.words);
    }

    fn poll(&mut self, times: usize) {
        for _ in 0..times {
            match self.engine.poll(self.now) {
                Poll::Act(action) => self.act(action),
                Poll::Bulk(Bulk::Pages { channel, runs, .. }) => {
                    let count = runs.iter().map(|run| run.count).sum();
                    self.engine.sent(channel, sent(PageRun::new(0, count)));
                }
                Poll::Bulk(Bulk::Bitmap { index, first, limits }) => {
                    let count = limits.words.min(self.infos[index as usize].words() - first);
                    self.bitmaps.words(index, first, count).expect("words in order");
                    self.engine.sent_bitmap(count, count * 8);
                }
                Poll::Wait(_) => return,
            }
        }
    }

    fn act(&mut self, action: Action) {
        assert!(!self.ended, "{action:?} after the end");
        match action {
            Action::Send(frame) => {
                assert!(frame != Frame::Commit || self.given_up, "committed before the guest was given up");
                assert!(self.connected, "{frame:?} without a connection");
                match &frame {
                    Frame::Switchover(package) => {
                        self.infos.clone_from(&package.bitmaps);
                        self.bitmaps = IncomingBitmaps::new(&package.bitmaps);
                    }
                    Frame::BitmapComplete(index) => self.bitmaps.complete(*index).expect("all its words went"),
                    Frame::End => assert!(self.bitmaps.all_complete()),
                    _ => {}
                }
                let length = frame.encode().expect("what is sent can be encoded").len();
                self.engine.sent_frame(&frame, length as u64);
            }
            Action::Connect => self.connected = true,
            Action::Disconnect(_) => {
                assert!(self.given_up, "paused before the commit");
                self.connected = false;
            }
            Action::OpenOthers => assert!(self.connected),
            Action::StartTracking => self.engine.handle(Input::Harvested(everything()), self.now),
            Action::Harvest => self.engine.handle(Input::Harvested(some_pages()), self.now),
            Action::Stop => {
                self.stopped = true;
                let bitmap = |name: &str| BitmapInfo {
                    disk: "root".into(),
                    name: name.into(),
                    granularity: 512,
                    bits: 999,
                    flags: BitmapFlags::default(),
                };
                let bitmaps = vec![bitmap("a"), bitmap("b")];
                let stopped = Stopped {
                    machine: vec![2; 10],
                    rest: Vec::new(),
                    dirty: some_pages(),
                    bitmaps,
                    stop_us: 1,
                    device_state_us: 1,
                    last_sync_us: 1,
                };
                self.engine.handle(Input::Stopped(Box::new(stopped)), self.now);
            }
            Action::Resume => {
                assert!(!self.given_up, "the guest runs again though it was given up");
                self.stopped = false;
            }
            Action::GiveUp => {
                assert!(self.stopped);
                self.given_up = true;
            }
            Action::Throttle(_) => {}
            Action::Watch => panic!("a dry run was not asked for"),
            Action::End(outcome) => {
                self.ended = true;
                assert_eq!(matches!(*outcome, Outcome::NotMoved(_)), !self.given_up, "{outcome:?}");
                assert!(self.given_up || !self.stopped, "the guest stands still and belongs to nobody");
            }
        }
    }
}

fn some_pages() -> PageSet {
    let mut pages = PageSet::empty(PAGES);
    pages.insert(PageRun::new(100, 70));
    pages
}

fn sent(run: PageRun) -> Sent {
    Sent { normal: run.count, bytes: run.bytes(), busy: Duration::from_micros(run.count), ..Sent::default() }
}

fn everything() -> PageSet {
    let mut pages = PageSet::full(PAGES);
    pages.remove(PageRun::new(RAM_PAGES, RAM_PAGES));
    pages
}
