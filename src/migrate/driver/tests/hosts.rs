//! Owners of guests as simple as can be, and what they saw.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::guest;
use crate::block::disk::Disk;
use crate::memory::GuestRam;
use crate::migrate::bitmap_mapping::BitmapMapping;
use crate::migrate::driver::destination::DestinationMigration;
use crate::migrate::driver::owner::{DestinationOwner, MachineSetup, PageTransfer, Preparation, SourceOwner, SourceRequest, StoppedGuest};
use crate::migrate::driver::source::SourceMigration;
use crate::migrate::layout::Layout;
use crate::migrate::report::{Mode, Report, Status};
use crate::migrate::transport::{Address, Listener};
use crate::migrate::{destination, source};
use crate::vm::config::GuestConfig;
use crate::vm::facts::MachineFacts;
use crate::vm::{Moved, Paused, Running, Vm};

/// Nothing here takes longer than this.
pub const LIMIT: Duration = Duration::from_secs(30);

pub enum Guest {
    Running(Vm<Running>),
    Paused(Vm<Paused>),
}

impl Guest {
    pub fn ram(&self) -> GuestRam {
        match self {
            Guest::Running(vm) => vm.ram().clone(),
            Guest::Paused(vm) => vm.ram().clone(),
        }
    }

    pub fn pause(self) -> Vm<Paused> {
        match self {
            Guest::Running(vm) => vm.pause().unwrap_or_else(|failed| panic!("{}", failed.error)),
            Guest::Paused(vm) => vm,
        }
    }
}

pub struct SourceHost {
    pub guest: Mutex<Option<Guest>>,
    pub ram: GuestRam,
    pub config: GuestConfig,
    pub disks: Vec<Arc<Disk>>,
    pub fail_take: bool,
    pub fail_put_back: bool,
    events: Sender<SourceEvent>,
    pub seen: Receiver<SourceEvent>,
}

pub enum SourceEvent {
    Changed(Status),
    Paused(String),
    Ended(Box<source::Outcome>, Option<Vm<Moved>>),
}

impl SourceHost {
    pub fn new(vm: Vm<Running>, config: GuestConfig, disks: Vec<Arc<Disk>>) -> Arc<Self> {
        let (events, seen) = unbounded();
        let ram = vm.ram().clone();
        let guest = Mutex::new(Some(Guest::Running(vm)));
        Arc::new(SourceHost { guest, ram, config, disks, fail_take: false, fail_put_back: false, events, seen })
    }

    pub fn migrate(self: &Arc<Self>, request: SourceRequest) -> SourceMigration {
        let (tracking, facts) = match self.guest.lock().unwrap().as_ref().unwrap() {
            Guest::Running(vm) => (vm.tracking().clone(), MachineFacts::of(vm)),
            Guest::Paused(vm) => (vm.tracking().clone(), MachineFacts::of(vm)),
        };
        let disk_sizes = self.disks.iter().map(|disk| disk.size()).collect();
        let setup = MachineSetup { config: self.config.clone(), facts, disk_sizes };
        SourceMigration::start(request, setup, self.ram.clone(), tracking, self.disks.clone(), self.clone()).unwrap()
    }

    pub fn wait_for(&self, wanted: Status) {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.seen.recv_deadline(deadline).expect("the source says nothing any more") {
                SourceEvent::Changed(status) if status == wanted => return,
                SourceEvent::Changed(_) | SourceEvent::Paused(_) => {}
                SourceEvent::Ended(outcome, _) => panic!("ended early: {outcome:?}"),
            }
        }
    }

    /// Waits until the link is lost after the commit; returns what a person is told.
    pub fn paused(&self) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.seen.recv_deadline(deadline).expect("the source does not pause") {
                SourceEvent::Paused(text) => return text,
                SourceEvent::Changed(_) => {}
                SourceEvent::Ended(outcome, _) => panic!("ended instead of waiting for a new link: {outcome:?}"),
            }
        }
    }

    pub fn outcome(&self) -> (source::Outcome, Option<Vm<Moved>>) {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let SourceEvent::Ended(outcome, moved) = self.seen.recv_deadline(deadline).expect("the source does not end") {
                return (*outcome, moved);
            }
        }
    }

    /// The guest runs here, which its counter shows.
    pub fn assert_runs(&self) {
        assert!(matches!(*self.guest.lock().unwrap(), Some(Guest::Running(_))));
        assert_counts(&self.ram);
    }
}

pub fn assert_counts(ram: &GuestRam) {
    let (before, deadline) = (guest::counter(ram), Instant::now() + LIMIT);
    while guest::counter(ram) == before {
        assert!(Instant::now() < deadline, "the guest stands still");
        std::thread::yield_now();
    }
}

impl SourceOwner for SourceHost {
    fn await_lull(&self) {}

    fn take(&self) -> Result<StoppedGuest, String> {
        if self.fail_take {
            return Err("it will not stand still".into());
        }
        let guest = self.guest.lock().unwrap().take().unwrap();
        let was_running = matches!(guest, Guest::Running(_));
        Ok(StoppedGuest { vm: guest.pause(), was_running })
    }

    fn stopped(&self) {}

    fn put_back(&self, guest: StoppedGuest) -> Result<(), String> {
        if self.fail_put_back {
            assert!(self.guest.lock().unwrap().replace(Guest::Paused(guest.vm)).is_none());
            return Err("its disk is gone".into());
        }
        let back = if guest.was_running {
            Guest::Running(guest.vm.resume().unwrap_or_else(|failed| panic!("{}", failed.error)))
        } else {
            Guest::Paused(guest.vm)
        };
        assert!(self.guest.lock().unwrap().replace(back).is_none());
        Ok(())
    }

    fn throttle(&self, percent: u8) -> Result<(), String> {
        let throttled = match self.guest.lock().unwrap().as_ref().unwrap() {
            Guest::Running(vm) => vm.throttle(percent),
            Guest::Paused(vm) => vm.throttle(percent),
        };
        throttled.map_err(|error| error.to_string())
    }

    fn changed(&self, status: Status, _pass: u32) {
        let _ = self.events.send(SourceEvent::Changed(status));
    }

    fn paused(&self, text: String) {
        let _ = self.events.send(SourceEvent::Paused(text));
    }

    fn completed(&self, _report: Report, _copied: Vec<PathBuf>) {}

    fn ended(&self, outcome: source::Outcome, moved: Option<Vm<Moved>>) {
        let _ = self.events.send(SourceEvent::Ended(Box::new(outcome), moved));
    }
}

pub struct DestinationHost {
    pub disks: Vec<Arc<Disk>>,
    pub refuse: Option<String>,
    pub refuse_run: Option<String>,
    pub guest: Mutex<Option<Guest>>,
    events: Sender<DestinationEvent>,
    pub seen: Receiver<DestinationEvent>,
}

#[derive(Debug)]
pub enum DestinationEvent {
    Runs,
    Paused(String),
    LostPage(String),
    Ended(destination::Outcome),
}

impl DestinationHost {
    pub fn with(disks: Vec<Arc<Disk>>, change: impl FnOnce(&mut DestinationHost)) -> Arc<Self> {
        let (events, seen) = unbounded();
        let guest = Mutex::new(None);
        let mut host = DestinationHost { disks, refuse: None, refuse_run: None, guest, events, seen };
        change(&mut host);
        Arc::new(host)
    }

    pub fn new() -> Arc<Self> {
        Self::with(Vec::new(), |_| {})
    }

    pub fn listen(self: &Arc<Self>, address: &str) -> (DestinationMigration, Address) {
        let listener = Listener::bind(&address.parse().unwrap()).unwrap();
        let address = listener.address().clone();
        (DestinationMigration::start(listener, self.clone()).unwrap(), address)
    }

    pub fn next(&self) -> DestinationEvent {
        self.seen.recv_timeout(LIMIT).expect("the destination says nothing any more")
    }

    /// Waits until the link is lost; returns why.
    pub fn paused(&self) -> String {
        match self.next() {
            DestinationEvent::Paused(reason) => reason,
            other => panic!("{other:?} instead of a lost link"),
        }
    }

    pub fn outcome(&self) -> destination::Outcome {
        loop {
            if let DestinationEvent::Ended(outcome) = self.next() {
                return outcome;
            }
        }
    }

    pub fn ram(&self) -> GuestRam {
        self.guest.lock().unwrap().as_ref().expect("no guest came").ram()
    }

    /// Pauses the guest for good.
    pub fn pause(&self) -> Vm<Paused> {
        self.guest.lock().unwrap().take().expect("no guest came").pause()
    }
}

impl DestinationOwner for DestinationHost {
    fn bitmap_mapping(&self) -> BitmapMapping {
        BitmapMapping::default()
    }

    fn prepare(&self, setup: MachineSetup, _layout: &Layout) -> Result<Preparation, String> {
        if let Some(reason) = &self.refuse {
            return Err(reason.clone());
        }
        let ram = setup.config.allocate_ram().map_err(|error| error.to_string())?;
        let its = ram.clone();
        let build = Box::new(move || Ok(guest::build(&setup.config, its)));
        Ok(Preparation { ram, disks: self.disks.clone(), build })
    }

    fn resumed(&self) {}

    fn run(&self, guest: StoppedGuest) -> Result<(), String> {
        for disk in &self.disks {
            disk.acquire().map_err(|error| error.to_string())?;
        }
        let paused = |vm| *self.guest.lock().unwrap() = Some(Guest::Paused(vm));
        if let Some(reason) = &self.refuse_run {
            paused(guest.vm);
            return Err(reason.clone());
        }
        if guest.was_running {
            let vm = guest.vm.resume().map_err(|failed| failed.error.to_string())?;
            *self.guest.lock().unwrap() = Some(Guest::Running(vm));
        } else {
            paused(guest.vm);
        }
        let _ = self.events.send(DestinationEvent::Runs);
        Ok(())
    }

    fn changed(&self, _status: Status) {}

    fn paused(&self, reason: String) {
        let _ = self.events.send(DestinationEvent::Paused(reason));
    }

    fn waits_for_lost_page(&self, text: String) {
        let _ = self.events.send(DestinationEvent::LostPage(text));
    }

    fn ended(&self, outcome: destination::Outcome) {
        let _ = self.events.send(DestinationEvent::Ended(outcome));
    }
}

/// Connections for pages in these tests.
pub const PAGE_CHANNELS: u8 = 2;

pub fn request(address: &Address, mode: Mode) -> SourceRequest {
    SourceRequest {
        address: address.clone(),
        bitmaps: BitmapMapping::default(),
        mode,
        downtime_limit: Duration::from_millis(300),
        max_bandwidth: None,
        max_postcopy_bandwidth: None,
        // So that versions of a page could overtake one another.
        pages: PageTransfer { channels: PAGE_CHANNELS, ..PageTransfer::default() },
        copy_storage: false,
        dry_run: false,
        switchover_bandwidth: None,
        pause_before_switchover: false,
        throttling: None,
    }
}

pub fn slow(bytes_per_second: u64, request: SourceRequest) -> SourceRequest {
    SourceRequest { max_bandwidth: NonZeroU64::new(bytes_per_second), ..request }
}
