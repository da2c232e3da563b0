//! Devices: what a vCPU reaches by port or memory access, how a device is drained, saved and restored.

pub mod bus;
pub mod cmos;
pub mod power;
pub mod serial;
pub mod virtio;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A device failed to pause, save or restore.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The saved state does not fit this device.
    #[error("device {id}: saved state cannot be loaded: {reason}")]
    State {
        /// Which device.
        id: String,
        /// What is wrong with the state.
        reason: String,
    },
    /// Work in flight could not be brought to an end.
    #[error("device {id}: {reason}")]
    Failed {
        /// Which device.
        id: String,
        /// What failed.
        reason: String,
    },
}

/// One device's saved state, as it stands in the package of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// [`Device::id`] of the device that saved it.
    pub id: String,
    /// Version of the layout of `state`, counted by each device for itself.
    pub version: u16,
    /// The device's own encoding (postcard of a private structure).
    pub state: Vec<u8>,
}

/// A device whose state moves with the guest.
pub trait Device: Send + Sync {
    /// A name that is the same on both sides, for example `serial` or `virtio-blk:root`.
    fn id(&self) -> &str;

    /// Stops the device's own threads and returns when nothing it began is in flight: no write to guest RAM, disk or host file comes
    /// after this returns. Called with all vCPUs stopped.
    fn pause(&self) -> Result<(), DeviceError>;

    /// Lets the device work again, looking at its queues once for what arrived meanwhile. Called before the vCPUs run.
    fn resume(&self) -> Result<(), DeviceError>;

    /// The state of the paused device. May write guest RAM (marked dirty), so the last harvest comes after it.
    fn save(&self) -> Result<DeviceState, DeviceError>;

    /// Loads state into the paused device. The state is hostile input: every index and address in it is checked. May read guest RAM,
    /// which in postcopy can wait for a page.
    fn restore(&self, state: &DeviceState) -> Result<(), DeviceError>;
}
