//! The events of the control socket.

use serde::Serialize;

use crate::block::io_error::BlockIoError;
use crate::migrate::report::{Report, Status};

/// An event, named and shaped as QEMU's.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Event {
    /// The guest is paused.
    Stop,
    /// The guest runs again.
    Resume,
    /// The guest was asked to power off.
    Powerdown,
    /// The guest, or Ferry with it, comes to its end.
    Shutdown(ShutdownCause),
    /// The guest restarts.
    Reset(ShutdownCause),
    /// A request failed at the disk's image.
    BlockIoError(BlockIoError),
    /// The migration's status changed.
    Migration(MigrationEvent),
    /// A pass of precopy began.
    MigrationPass {
        /// Counted from 1.
        pass: u32,
    },
    /// An export is gone, and its id free.
    BlockExportDeleted {
        /// Its id.
        id: String,
    },
}

/// Data of SHUTDOWN and RESET.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ShutdownCause {
    /// Whether the guest did it itself.
    pub guest: bool,
    /// Why.
    pub reason: ShutdownReason,
}

/// Reasons of SHUTDOWN and RESET (the subset of QEMU's `ShutdownCause` that Ferry has).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownReason {
    /// The guest powered off.
    GuestShutdown,
    /// The guest restarted.
    GuestReset,
    /// The guest crashed: a triple fault, or KVM gave up.
    GuestPanic,
    /// The command `quit`.
    HostQmpQuit,
    /// A signal.
    HostSignal,
    /// The console's Ctrl-A X.
    HostUi,
    /// Ferry could not go on.
    HostError,
}

impl From<ShutdownReason> for ShutdownCause {
    fn from(reason: ShutdownReason) -> Self {
        use ShutdownReason::*;
        ShutdownCause { guest: matches!(reason, GuestShutdown | GuestReset | GuestPanic), reason }
    }
}

/// Data of MIGRATION.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MigrationEvent {
    /// The new status.
    pub status: Status,
    /// Ferry's own: what the migration cost, when it has ended. The source's process ends with a completed migration, so whoever
    /// follows the events needs it here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<Box<Report>>,
}
