//! What two Ferries once said to each other, and whether this one still understands it.

use std::collections::VecDeque;
use std::time::Duration;

use ferry::memory::PageSet;
use ferry::migrate::destination::{Action as DestinationAction, Destination, Input, Link, Outcome as DestinationOutcome, Placement, Poll};
use ferry::migrate::driver::saved;
use ferry::migrate::layout::Layout;
use ferry::migrate::report::Mode;
use ferry::migrate::source::{self, Bulk, Config, Outcome, Sent, Source, Stopped};
use ferry::migrate::wire::{Channel, Frame, HEADER_SIZE, Header, Kind, Package, Setup, Totals};

const NOW: Duration = Duration::ZERO;
/// Longer than the source gives the guest before it sends the rest.
const CALM: Duration = Duration::from_millis(10);

/// The connections of one migration in the order in which they were opened: the frames in each direction, without the contents of pages.
pub struct Recording {
    connections: Vec<[Vec<Frame>; 2]>,
}

impl Recording {
    /// From the bytes of each direction of each connection, whose `Pages` frames are only their headers.
    pub fn new(connections: &[[Vec<u8>; 2]]) -> Self {
        Recording { connections: connections.iter().map(|directions| directions.each_ref().map(|bytes| decode(bytes))).collect() }
    }

    /// The kinds of all frames, in both directions.
    pub fn kinds(&self) -> Vec<Kind> {
        self.connections.iter().flatten().flatten().map(Frame::kind).collect()
    }

    /// What came on the connections for pages, and on the urgent one.
    fn pages(&self) -> VecDeque<(Channel, Frame)> {
        let mut pages = VecDeque::new();
        for [to_destination, _] in &self.connections {
            let Some(Frame::Hello(hello)) = to_destination.first() else { panic!("no greeting") };
            if hello.channel != Channel::Main {
                pages.extend(to_destination[1..].iter().map(|frame| (hello.channel, frame.clone())));
            }
        }
        pages
    }

    fn package(&self) -> &Package {
        let package =
            self.connections[0][0].iter().find_map(|frame| if let Frame::Switchover(package) = frame { Some(package) } else { None });
        package.expect("a package")
    }

    /// This Ferry's destination understands the recorded source, to the end: every page and every bitmap is accounted for, and the guest's
    /// configuration and state decode.
    pub fn is_understood_by_the_destination(&self) {
        let mut host = DestinationHost { engine: Destination::new(), pages: self.pages(), arrived: Totals::default(), outcome: None };
        for [to_destination, _] in &self.connections {
            let Some(Frame::Hello(hello)) = to_destination.first() else { panic!("no greeting") };
            host.engine.hello(hello, NOW).unwrap();
        }
        for frame in &self.connections[0][0][1..] {
            match frame {
                Frame::PassEnd(sent) => host.pages_arrive(Some(*sent)),
                Frame::Switchover(package) => host.pages_arrive(Some(package.sent)),
                Frame::End => host.pages_arrive(None),
                _ => {}
            }
            host.engine.handle(Input::Frame(Link(0), Channel::Main, frame.clone()));
            host.acts();
        }
        assert_eq!(host.outcome, Some(DestinationOutcome::Completed));
    }

    /// This Ferry's source understands the recorded destination.
    pub fn is_understood_by_the_source(&self) {
        let setup = self.connections[0][0].iter().find(|frame| frame.kind() == Kind::Setup);
        let Some(Frame::Setup(Setup { ram_pages, host_page, page_channels, machine, disks, .. })) = setup.cloned() else {
            panic!("no setup")
        };
        let layout = Layout::new(ram_pages, host_page, &disks).unwrap();
        let mode = if self.package().postcopy { Mode::Postcopy } else { Mode::Precopy };
        let downtime_limit = Duration::from_secs(1);
        let mut now = NOW;
        let mut engine = Source::new(Config { mode, downtime_limit, layout: layout.clone(), page_channels, session: 1, machine });
        loop {
            let input = match engine.poll(now) {
                source::Poll::Act(source::Action::Send(frame)) => self.answer(&frame).map(source::Input::Frame),
                source::Poll::Act(source::Action::StartTracking) => Some(source::Input::Harvested(everything(&layout))),
                source::Poll::Act(source::Action::Harvest) => Some(source::Input::Harvested(PageSet::empty(layout.pages()))),
                source::Poll::Act(source::Action::Stop) => Some(source::Input::Stopped(Box::new(Stopped {
                    machine: self.package().machine.clone(),
                    rest: Vec::new(),
                    dirty: PageSet::empty(layout.pages()),
                    bitmaps: self.package().bitmaps.clone(),
                    stop_us: 1,
                    device_state_us: 1,
                    last_sync_us: 1,
                }))),
                source::Poll::Act(source::Action::End(outcome)) => {
                    assert!(matches!(*outcome, Outcome::Completed(_)), "{outcome:?}");
                    return;
                }
                source::Poll::Act(_) => None,
                source::Poll::Bulk(Bulk::Pages { channel, .. }) => {
                    engine.sent(channel, Sent::default());
                    None
                }
                source::Poll::Bulk(Bulk::Bitmap { index, first, .. }) => {
                    engine.sent_bitmap(self.package().bitmaps[index as usize].words() - first, 0);
                    None
                }
                // Before what goes in the background.
                source::Poll::Wait(Some(until)) if until <= NOW + CALM => {
                    now = until;
                    None
                }
                source::Poll::Wait(_) => panic!("the source waits for something that was not recorded"),
            };
            input.into_iter().for_each(|input| engine.handle(input, now));
        }
    }

    /// What the recorded destination said to such a frame.
    fn answer(&self, frame: &Frame) -> Option<Frame> {
        let kind = match frame.kind() {
            Kind::Hello => Kind::Welcome,
            Kind::Setup => Kind::Prepared,
            Kind::PassEnd => Kind::PassAck,
            Kind::Switchover => Kind::Ready,
            Kind::Commit => Kind::Running,
            Kind::End => Kind::Done,
            _ => return None,
        };
        self.connections[0][1].iter().find(|frame| frame.kind() == kind).cloned()
    }
}

struct DestinationHost {
    engine: Destination,
    pages: VecDeque<(Channel, Frame)>,
    arrived: Totals,
    outcome: Option<DestinationOutcome>,
}

impl DestinationHost {
    /// All that are left, or as many as the source had sent.
    fn pages_arrive(&mut self, sent: Option<Totals>) {
        while sent != Some(self.arrived) {
            let Some((channel, frame)) = self.pages.pop_front() else {
                assert_eq!(sent, None, "pages are not in the recording");
                return;
            };
            match frame {
                Frame::Zero(runs) => {
                    let zero = runs.iter().map(|run| run.count).sum();
                    let (placement, _) = self.engine.zero(channel, &runs).unwrap();
                    self.placed(placement, Totals { normal: 0, zero }, &runs);
                }
                Frame::Pages(run) => {
                    let placement = self.engine.pages(channel, run).unwrap();
                    self.placed(placement, Totals { normal: run.count, zero: 0 }, &[run]);
                }
                Frame::Compressed(compressed) => {
                    let run = compressed.run;
                    let mut contents = vec![0; run.bytes() as usize];
                    let mut decompressor = ferry::migrate::compression::Decompressor::default();
                    decompressor.decompress(compressed.method, &compressed.contents, &mut contents).unwrap();
                    let placement = self.engine.pages(channel, run).unwrap();
                    self.placed(placement, Totals { normal: run.count, zero: 0 }, &[run]);
                }
                other => panic!("{other:?} among pages"),
            }
        }
    }

    fn placed(&mut self, placement: Placement, pages: Totals, runs: &[ferry::memory::PageRun]) {
        match placement {
            Placement::Direct => {
                self.arrived = Totals { normal: self.arrived.normal + pages.normal, zero: self.arrived.zero + pages.zero };
                self.engine.received(pages);
            }
            Placement::Staged => panic!("this host does not stage huge pages"),
            Placement::Fault => runs.iter().for_each(|run| self.engine.placed(*run, NOW)),
        }
    }

    fn acts(&mut self) {
        while let Poll::Act(action) = self.engine.poll(NOW) {
            match action {
                DestinationAction::Prepare(Setup { ram_pages, machine, .. }) => {
                    saved::decode_setup(&machine, ram_pages).unwrap();
                    self.engine.handle(Input::Prepared);
                }
                DestinationAction::Load(package) => {
                    saved::decode_guest(&package.machine).unwrap();
                    self.engine.handle(Input::Loaded { load_us: 1, warnings: Vec::new() });
                }
                DestinationAction::FlushDisks => self.engine.handle(Input::DisksFlushed),
                DestinationAction::Run => self.engine.handle(Input::Ran(1)),
                DestinationAction::End(outcome) => self.outcome = Some(outcome),
                _ => {}
            }
        }
    }
}

fn decode(mut bytes: &[u8]) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER_SIZE>() {
        let header = Header::decode(*header).unwrap();
        let length = if header.kind == Kind::Pages { 0 } else { header.length };
        frames.push(Frame::decode(header, &rest[..length]).unwrap());
        bytes = &rest[length..];
    }
    frames
}

/// The pages of RAM, and all blocks of the disks that are copied.
fn everything(layout: &Layout) -> PageSet {
    let mut pages = PageSet::empty(layout.pages());
    for run in layout.disks().map(|(_, pages)| pages).chain([layout.ram()]) {
        pages.insert(run);
    }
    pages
}
