//! What a migration asks of whoever owns the guest. The right to run the guest is the value [`Vm`]: it is handed over here, and never two
//! hold it.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::block::disk::Disk;
use crate::memory::GuestRam;
use crate::migrate::bitmap_mapping::BitmapMapping;
use crate::migrate::layout::Layout;
use crate::migrate::policy::Throttling;
use crate::migrate::report::{Mode, Report, Status};
use crate::migrate::transport::Address;
#[cfg(doc)]
use crate::migrate::wire::MAX_PAGE_CHANNELS;
use crate::migrate::wire::Method;
use crate::migrate::{destination, source};
use crate::vm::config::GuestConfig;
use crate::vm::facts::MachineFacts;
use crate::vm::{Built, Moved, Paused, Vm};

/// A guest that stands still, in the hands of the migration.
pub struct StoppedGuest {
    /// The guest.
    pub vm: Vm<Paused>,
    /// Whether it ran before, and is to run where it goes; a guest that a person paused stays paused.
    pub was_running: bool,
}

/// The owner of a guest that is to go away.
pub trait SourceOwner: Send + Sync {
    /// Returns at a good moment to stop the guest, or soon.
    fn await_lull(&self);
    /// Pauses the guest and hands it over. Until [`SourceOwner::put_back`] the owner cannot run it.
    fn take(&self) -> Result<StoppedGuest, String>;
    /// The guest, which ran, was stopped: said after the switch, or when that takes long, for whoever watches.
    fn stopped(&self);
    /// The switch did not take place: the guest goes on, if it ran before. An error is a guest that stays paused, and why.
    fn put_back(&self, guest: StoppedGuest) -> Result<(), String>;
    /// Makes the guest's vCPUs stand still for `percent` of the time; 0 ends that. An error ends the migration.
    fn throttle(&self, percent: u8) -> Result<(), String>;
    /// The migration's status or pass has changed.
    fn changed(&self, status: Status, pass: u32);
    /// After the commit the link was lost; with what to tell a person. Pages of the guest may be needed from here, so that this process
    /// is to stay until [`super::source::SourceMigration::recover`] has joined the two again.
    fn paused(&self, text: String);
    /// All of the guest is at the destination, and the images of disks that were `copied` are stale. For whoever waits for it: the connections
    /// are closed after that.
    fn completed(&self, report: Report, copied: Vec<PathBuf>);
    /// The migration is over. With the guest's RAM if it was given up.
    fn ended(&self, outcome: source::Outcome, moved: Option<Vm<Moved>>);
}

/// The guest's configuration and what it needs of a host, as it rides in the `Setup` frame.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineSetup {
    /// The configuration.
    pub config: GuestConfig,
    /// What the host must have.
    pub facts: MachineFacts,
    /// Sizes of the disks in bytes, in the order of the configuration: the destination's must be the same.
    pub disk_sizes: Vec<u64>,
}

/// Builds the machine of a guest that comes: takes a few milliseconds.
pub type Build = Box<dyn FnOnce() -> Result<Vm<Built>, String> + Send>;

/// What is there before the first page comes.
pub struct Preparation {
    /// The guest's RAM.
    pub ram: GuestRam,
    /// The guest's disks, not locked.
    pub disks: Vec<Arc<Disk>>,
    /// The rest of the machine, to be built while pages come.
    pub build: Build,
}

/// The future owner of a guest that comes.
pub trait DestinationOwner: Send + Sync {
    /// Checks that this host can run the guest, opens its disks without locking them, creates the images of those that are copied, which `layout`
    /// names by their indices, and allocates RAM. The error is shown to the person at the source.
    fn prepare(&self, setup: MachineSetup, layout: &Layout) -> Result<Preparation, String>;
    /// What dirty bitmaps are expected, and under what names; asked when they come.
    fn bitmap_mapping(&self) -> BitmapMapping;
    /// After the commit: takes the disks' locks and runs the guest, if it is to run. An error is a guest that is here but stays paused,
    /// and why.
    fn run(&self, guest: StoppedGuest) -> Result<(), String>;
    /// The guest runs: said a moment later, for whoever watches.
    fn resumed(&self);
    /// The migration's status has changed.
    fn changed(&self, status: Status);
    /// After the source may have given the guest up the link was lost, for this reason. The guest runs on, if it runs, until it needs a
    /// missing page; a source that comes back is let in.
    fn paused(&self, reason: String);
    /// The guest waits for a page that cannot come because the link is lost; said once for each page.
    fn waits_for_lost_page(&self, text: String);
    /// The migration is over.
    fn ended(&self, outcome: destination::Outcome);
}

/// What a person asks of a migration.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceRequest {
    /// Where the destination listens.
    pub address: Address,
    /// How RAM moves.
    pub mode: Mode,
    /// Longest accepted blackout.
    pub downtime_limit: Duration,
    /// Bytes a second in precopy; `None`: no limit.
    pub max_bandwidth: Option<NonZeroU64>,
    /// Bytes a second in postcopy's background; `None`: no limit.
    pub max_postcopy_bandwidth: Option<NonZeroU64>,
    /// How pages travel.
    pub pages: PageTransfer,
    /// Which dirty bitmaps go along.
    pub bitmaps: BitmapMapping,
    /// Whether the contents of disks go along, for a destination that has no images yet. Read-only disks it must have.
    pub copy_storage: bool,
    /// Only find out how a migration would go: nothing is moved.
    pub dry_run: bool,
    /// Bytes a second to count on in the switch; `None`: what was measured.
    pub switchover_bandwidth: Option<NonZeroU64>,
    /// How far the guest may be slowed down in mode precopy; `None`: not at all.
    pub throttling: Option<Throttling>,
    /// Wait for a person when the guest stands still, before it is handed over.
    pub pause_before_switchover: bool,
}

/// How pages travel in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageTransfer {
    /// Connections for them: 1 to [`MAX_PAGE_CHANNELS`].
    pub channels: u8,
    /// How they are compressed where that saves time; `None`: never.
    pub compression: Option<Method>,
    /// Whether pages of zeros go by name. Without it, they go as any other page: for a destination that is to hold them.
    pub zero_page_detection: bool,
}

impl PageTransfer {
    /// Bandwidth up to which one connection and the processor that serves it are enough for any, in bytes a second: 10 Gbit/s.
    const ONE_IS_ENOUGH: u64 = 1_250_000_000;

    /// How many connections suit this host and a link that may be used up to `max_bandwidth` bytes a second. Each takes a processor to
    /// look at pages and send them; half of them, and at most four, are left to that.
    pub fn default_channels(max_bandwidth: Option<NonZeroU64>) -> u8 {
        if max_bandwidth.is_some_and(|limit| limit.get() <= Self::ONE_IS_ENOUGH) {
            return 1;
        }
        let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
        (processors / 2).clamp(1, 4) as u8
    }
}

impl Default for PageTransfer {
    fn default() -> Self {
        PageTransfer { channels: Self::default_channels(None), compression: None, zero_page_detection: true }
    }
}
