//! What the command line asks of the monitor.

use std::path::PathBuf;

use super::serial::SerialTarget;
use crate::memory::dirty_tracker::TrackerChoice;
use crate::vm::config::GuestConfig;

/// `ferry run`.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The guest to boot.
    pub config: GuestConfig,
    /// Where its serial console goes.
    pub serial: SerialTarget,
    /// Control socket to listen on.
    pub qmp: Option<PathBuf>,
    /// How the guest's dirty pages can be tracked when it moves on.
    pub tracker: TrackerChoice,
}

/// `ferry receive`.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// `tcp:HOST:PORT` or `unix:PATH` to wait on.
    pub listen: String,
    /// Where disks are on this host, by id; others are where the source has them.
    pub disks: Vec<(String, PathBuf)>,
    /// Where the guest's serial console goes.
    pub serial: SerialTarget,
    /// Control socket to listen on.
    pub qmp: Option<PathBuf>,
    /// How the guest's dirty pages can be tracked when it moves on.
    pub tracker: TrackerChoice,
}
