//! The engines' values, each with a number, so that a state of the model is small and two of them are compared quickly.
//!
//! What an engine does depends on nothing but its value and the call, so every pair of them is tried once and remembered. Two values are
//! the same if they look the same in every field but for words to people. Time stands still.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::time::Duration;

use ferry::memory::{HostPage, PageNumber, PageRun, PageSet};
use ferry::migrate::destination::{self, Destination, Link, Placement};
use ferry::migrate::incoming::FaultAnswer;
use ferry::migrate::layout::Layout;
use ferry::migrate::report::Mode;
use ferry::migrate::source::{self, Config, Sent, Source, Stopped};
use ferry::migrate::wire::{BitmapFlags, BitmapInfo, Channel, Frame, Hello, Totals, VERSION};

/// Pages of the guest's RAM; the last one is zero.
pub const PAGES: u64 = 2;
/// The only connection for them.
pub const PAGES_CHANNEL: Channel = Channel::Pages(0);
/// The only bitmap has as many bits.
pub const BITS: u64 = 64;
const SESSION: u128 = 42;
const NOW: Duration = Duration::from_secs(1);
/// When every deadline has passed.
const LATE: Duration = Duration::from_secs(3600);

/// The number of a value among those of its kind.
pub type Id = u32;

/// Values and their numbers.
struct Numbered<T> {
    ids: HashMap<String, Id>,
    values: Vec<T>,
}

impl<T: Debug> Numbered<T> {
    fn new() -> Self {
        Numbered { ids: HashMap::new(), values: Vec::new() }
    }

    fn id(&mut self, value: T) -> Id {
        *self.ids.entry(without_words(&format!("{value:?}"))).or_insert_with(|| {
            self.values.push(value);
            self.values.len() as Id - 1
        })
    }

    fn get(&self, id: Id) -> &T {
        &self.values[id as usize]
    }
}

/// `text` without what is between quotation marks.
fn without_words(text: &str) -> String {
    let (mut quoted, mut escaped) = (false, false);
    let keep = |character: &char| {
        let was_quoted = quoted;
        match character {
            '"' if !escaped => quoted = !quoted,
            _ => {}
        }
        escaped = *character == '\\' && !escaped;
        !was_quoted || !quoted
    };
    text.chars().filter(keep).collect()
}

/// What can be asked of the source's engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ToSource {
    Poll,
    /// A poll after every deadline.
    PollLate,
    Frame(Id),
    Lost(Channel),
    /// The answer to `Harvest` and `StartTracking`.
    Harvested {
        first: bool,
    },
    Stopped,
    Sent {
        normal: u64,
        zero: u64,
    },
    /// The bitmap's only word.
    SentBitmap,
    GiveUpFailed,
    ConnectFailed,
    Request(PageRun),
    Cancel,
    Continue,
    Pause,
    Recover,
}

/// What can be asked of the destination's engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ToDestination {
    Poll,
    Hello(u32, Channel),
    Frame(u32, Channel, Id),
    Lost(u32, Channel),
    /// Pages that come are placed at once.
    Pages(Channel, PageRun),
    Zero(Channel, PageRun),
    Fault(PageNumber),
    Renew,
    Prepared,
    Loaded,
    LoadFailed,
    Ran,
    GiveUp,
    Pause,
}

/// What the source's engine answers.
#[derive(Clone, Debug)]
pub enum Said {
    Nothing,
    Poll(source::Poll),
    Refused,
}

/// What the destination's engine answers.
#[derive(Clone, Debug)]
pub enum Answer {
    Nothing,
    Poll(destination::Poll),
    /// The connection belongs to this link.
    Accepted(u32),
    Refused,
    /// To be asked for on the urgent connection.
    Ask(Vec<PageRun>),
}

/// All engines and frames that were ever met.
pub struct Engines {
    frames: Numbered<Frame>,
    sources: Numbered<Source>,
    destinations: Numbered<Destination>,
    source_calls: HashMap<(Id, ToSource), (Id, Said)>,
    destination_calls: HashMap<(Id, ToDestination), (Id, Answer)>,
}

impl Engines {
    pub fn new() -> Self {
        Engines {
            frames: Numbered::new(),
            sources: Numbered::new(),
            destinations: Numbered::new(),
            source_calls: HashMap::new(),
            destination_calls: HashMap::new(),
        }
    }

    /// A source and a destination that have not begun.
    pub fn begin(&mut self, mode: Mode) -> (Id, Id) {
        let downtime_limit = Duration::from_millis(50);
        let config = Config {
            mode,
            downtime_limit,
            layout: Layout::new(PAGES, HostPage::SMALL, &[]).unwrap(),
            page_channels: 1,
            session: SESSION,
            machine: Vec::new(),
        };
        let mut source = Source::new(config);
        // Who goes on at once has not waited.
        source.handle(source::Input::PauseBeforeSwitchover(true), Duration::ZERO);
        (self.sources.id(source), self.destinations.id(Destination::new()))
    }

    pub fn frame_id(&mut self, frame: Frame) -> Id {
        self.frames.id(frame)
    }

    pub fn hello_id(&mut self, link: u32, channel: Channel) -> Id {
        self.frame_id(Source::hello(SESSION, link, channel))
    }

    pub fn frame(&self, id: Id) -> &Frame {
        self.frames.get(id)
    }

    pub fn source(&self, id: Id) -> &Source {
        self.sources.get(id)
    }

    pub fn destination(&self, id: Id) -> &Destination {
        self.destinations.get(id)
    }

    /// Engine values met: sources and destinations.
    pub fn count(&self) -> (usize, usize) {
        (self.sources.values.len(), self.destinations.values.len())
    }

    /// The source's engine after the call, and what it said to a poll.
    pub fn call_source(&mut self, id: Id, call: ToSource) -> (Id, Said) {
        if let Some(known) = self.source_calls.get(&(id, call)) {
            return known.clone();
        }
        let mut engine = self.sources.get(id).clone();
        let mut said = Said::Nothing;
        let input = match call {
            ToSource::Poll | ToSource::PollLate => {
                said = Said::Poll(engine.poll(if call == ToSource::Poll { NOW } else { LATE }));
                None
            }
            ToSource::Sent { normal, zero } => {
                engine.sent(PAGES_CHANNEL, Sent { normal, zero, ..Sent::default() });
                None
            }
            ToSource::SentBitmap => {
                engine.sent_bitmap(1, 8);
                None
            }
            ToSource::Request(run) => engine.request(run).err().map(|reason| {
                said = Said::Refused;
                source::Input::Failed(reason)
            }),
            ToSource::Frame(frame) => Some(source::Input::Frame(self.frames.get(frame).clone())),
            ToSource::Lost(channel) => Some(source::Input::Lost(channel, String::new())),
            ToSource::Harvested { first: true } => Some(source::Input::Harvested(PageSet::full(PAGES))),
            ToSource::Harvested { first: false } => Some(source::Input::Harvested(PageSet::empty(PAGES))),
            ToSource::Stopped => Some(source::Input::Stopped(Box::new(stopped()))),
            ToSource::GiveUpFailed => Some(source::Input::GiveUpFailed(String::new())),
            ToSource::ConnectFailed => Some(source::Input::Failed(String::new())),
            ToSource::Continue => Some(source::Input::Continue),
            ToSource::Cancel => Some(source::Input::Cancel),
            ToSource::Pause => Some(source::Input::Pause),
            ToSource::Recover => Some(source::Input::Recover),
        };
        if let Some(input) = input {
            engine.handle(input, NOW);
        }
        let result = (self.sources.id(engine), said);
        self.source_calls.insert((id, call), result.clone());
        result
    }

    /// The destination's engine after the call, and its answer.
    pub fn call_destination(&mut self, id: Id, call: ToDestination) -> (Id, Answer) {
        if let Some(known) = self.destination_calls.get(&(id, call)) {
            return known.clone();
        }
        let mut engine = self.destinations.get(id).clone();
        let mut answer = Answer::Nothing;
        let input = match call {
            ToDestination::Poll => {
                answer = Answer::Poll(engine.poll(NOW));
                None
            }
            ToDestination::Hello(link, channel) => {
                let hello = Hello { channel, session: SESSION, link, program: String::new(), version: VERSION };
                answer = engine.hello(&hello, NOW).map_or(Answer::Refused, |link| Answer::Accepted(link.0));
                None
            }
            ToDestination::Pages(channel, run) | ToDestination::Zero(channel, run) => {
                let is_zero = matches!(call, ToDestination::Zero(..));
                let placement =
                    if is_zero { engine.zero(channel, &[run]).map(|(placement, _)| placement) } else { engine.pages(channel, run) };
                match placement {
                    Ok(Placement::Direct) if is_zero => engine.received(Totals { normal: 0, zero: run.count }),
                    Ok(Placement::Direct) => engine.received(Totals { normal: run.count, zero: 0 }),
                    Ok(Placement::Fault) => engine.placed(run, NOW),
                    // No host of the model can.
                    Ok(Placement::Staged) => {}
                    Err(_) => answer = Answer::Refused,
                }
                placement.err().map(destination::Input::Failed)
            }
            ToDestination::Fault(page) => {
                if let FaultAnswer::Request(run) = engine.fault(page, NOW) {
                    answer = Answer::Ask(vec![run]);
                }
                None
            }
            ToDestination::Renew => {
                answer = Answer::Ask(engine.renew_requests());
                None
            }
            ToDestination::Frame(link, channel, frame) => {
                Some(destination::Input::Frame(Link(link), channel, self.frames.get(frame).clone()))
            }
            ToDestination::Lost(link, channel) => Some(destination::Input::Lost(Link(link), channel, String::new())),
            ToDestination::Prepared => Some(destination::Input::Prepared),
            ToDestination::Loaded => Some(destination::Input::Loaded { load_us: 1, warnings: Vec::new() }),
            ToDestination::LoadFailed => Some(destination::Input::Failed(String::new())),
            ToDestination::Ran => Some(destination::Input::Ran(1)),
            ToDestination::GiveUp => Some(destination::Input::GiveUp(String::new())),
            ToDestination::Pause => Some(destination::Input::Pause),
        };
        if let Some(input) = input {
            engine.handle(input);
        }
        let result = (self.destinations.id(engine), answer);
        self.destination_calls.insert((id, call), result.clone());
        result
    }
}

/// A guest that has written to its first page since the last harvest, and has one bitmap of one word.
fn stopped() -> Stopped {
    let mut dirty = PageSet::empty(PAGES);
    dirty.insert(PageRun::new(0, 1));
    let bitmap = BitmapInfo {
        disk: "root".into(),
        name: "backup".into(),
        granularity: 65536,
        bits: BITS,
        flags: BitmapFlags { enabled: true, persistent: false },
    };
    Stopped { machine: Vec::new(), rest: Vec::new(), dirty, bitmaps: vec![bitmap], stop_us: 1, device_state_us: 1, last_sync_us: 1 }
}
