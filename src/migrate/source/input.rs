//! What the driver tells the source.

use std::num::NonZeroU64;
use std::time::Duration;

#[cfg(doc)]
use super::Action;
use crate::memory::{PageNumber, PageRun, PageSet};
use crate::migrate::policy::Throttling;
#[cfg(doc)]
use crate::migrate::wire::Setup;
use crate::migrate::wire::{BitmapInfo, Channel, Frame};

/// What the driver tells the source.
#[derive(Clone, Debug)]
pub enum Input {
    /// A frame came on the main connection.
    Frame(Frame),
    /// The answer to [`Action::StartTracking`](super::Action::StartTracking) and [`Action::Harvest`](super::Action::Harvest): pages dirtied since the last one.
    Harvested(PageSet),
    /// The guest stands still, and its state was saved: the answer to [`Action::Stop`](super::Action::Stop).
    Stopped(Box<Stopped>),
    /// The guest could not be stopped or saved: the answer to [`Action::Stop`](super::Action::Stop) otherwise.
    StopFailed(String),
    /// The right to run the guest could not be given up: the answer to [`Action::GiveUp`](super::Action::GiveUp) if it fails, before anything else is polled. The
    /// `Commit` frame is not sent, and the guest goes on.
    GiveUpFailed(String),
    /// The guest could not go on here: the answer to [`Action::Resume`](super::Action::Resume) if it fails. It stays paused.
    ResumeFailed(String),
    /// The guest has ended by itself before the commit; how.
    GuestEnded(String),
    /// Something else failed here. Before the commit the guest goes on.
    Failed(String),
    /// A connection is gone.
    Lost(Channel, String),
    /// A person wants it ended.
    Cancel,
    /// A person wants it joined again, on the connection that [`Action::Connect`] opens. Only when it is paused.
    Recover,
    /// A person breaks the link. Only after the commit.
    Pause,
    /// A person lets a migration that waits before the switch go on.
    Continue,
    /// A person wants to be waited for when the guest stands still, before the switch, or not any more. Does not end a wait.
    PauseBeforeSwitchover(bool),
    /// A person wants postcopy now.
    StartPostcopy,
    /// Where the guest's RAM is mapped by transparent huge pages, before the migration begins; as in [`Setup::huge`].
    HugeRanges(Vec<PageRun>),
    /// A person changed the limit.
    DowntimeLimit(Duration),
    /// A person says how many bytes a second to count on in the switch; `None`: what was measured.
    SwitchoverBandwidth(Option<NonZeroU64>),
    /// A person limits postcopy's background, in bytes a second, which the driver sees to; `None`: no limit. For a dry run's forecast.
    PostcopyBandwidth(Option<NonZeroU64>),
    /// A person allows the guest to be slowed down where precopy does not end otherwise, or forbids it.
    Throttling(Option<Throttling>),
}

/// Which pages the stopped guest brings along in what is encoded of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Companions {
    /// None.
    None,
    /// Those that it touches first: it goes on before the others come.
    Hot,
    /// All that are left: these, and what is dirtied until it stands still. If they are few, so that the switch need not wait for other
    /// connections and their threads; otherwise none.
    Rest(PageSet),
}

/// The stopped guest.
#[derive(Clone, Debug)]
pub struct Stopped {
    /// Devices, vCPUs and VM, encoded, with pages that it brings along.
    pub machine: Vec<u8>,
    /// These pages, where they are all that are left.
    pub rest: Vec<PageNumber>,
    /// Pages dirtied since the last harvest, harvested after the state was saved because saving can write guest RAM.
    pub dirty: PageSet,
    /// Dirty bitmaps that are to move.
    pub bitmaps: Vec<BitmapInfo>,
    /// Time until everything stood still, in microseconds.
    pub stop_us: u64,
    /// Time for saving, in microseconds.
    pub device_state_us: u64,
    /// Time for the last harvest, in microseconds.
    pub last_sync_us: u64,
}
