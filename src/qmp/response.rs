//! Typed answers of the query commands, in QEMU's shapes.

use serde::Serialize;
use serde_json::{Value, json};

use crate::block::io_error::IoStatus;
use crate::vm::config::{CacheMode, DiskConfig};

/// The guest's run state (the subset of QEMU's `RunState` that Ferry has).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// The vCPUs run.
    Running,
    /// A person stopped it.
    Paused,
    /// A disk failed, with `rerror` or `werror` to stop the guest; `cont` tries again.
    IoError,
    /// A destination that waits for its guest.
    Inmigrate,
    /// Paused for the switch.
    FinishMigrate,
    /// The guest has moved away; it will not run here again.
    Postmigrate,
    /// The guest has powered off.
    Shutdown,
    /// KVM gave up on the guest.
    InternalError,
}

/// Answer to `query-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StatusInfo {
    status: RunState,
    running: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    ferry: Option<Waiting>,
}

/// Ferry's addition to `query-status`: a guest that runs, but waits for pages that have not come yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Waiting {
    /// For how many.
    pub waiting_pages: u64,
    /// For how long it has waited for the first of them, in milliseconds.
    pub waiting_ms: u64,
}

impl StatusInfo {
    /// The guest's state, and what it waits for, if it does.
    pub fn new(status: RunState, waiting: Option<Waiting>) -> Self {
        StatusInfo { status, running: status == RunState::Running, ferry: waiting }
    }
}

/// A dirty bitmap in the answer to `query-block` (QEMU's `BlockDirtyInfo`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlockDirtyInfo {
    /// Its name.
    pub name: String,
    /// Dirty bytes: set bits times the granularity.
    pub count: u64,
    /// Bytes of disk to a bit.
    pub granularity: u64,
    /// Whether it records writes.
    pub recording: bool,
    /// Whether a migration holds it.
    pub busy: bool,
    /// Whether it outlives Ferry.
    pub persistent: bool,
    /// Whether it was in use when an earlier Ferry did not end cleanly: all that can be done is to remove it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub inconsistent: bool,
}

/// Answer to `x-debug-block-dirty-bitmap-sha256`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlockDirtyBitmapSha256 {
    /// In hexadecimal.
    pub sha256: String,
}

/// One disk in the answer to `query-named-block-nodes`, and in that to `query-block`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct BlockDeviceInfo(Value);

impl BlockDeviceInfo {
    /// A raw disk of `size` bytes.
    pub fn new(disk: &DiskConfig, size: u64, dirty_bitmaps: &[BlockDirtyInfo]) -> Self {
        let mut info = Self::of("raw", &disk.id, disk, size);
        info["ro"] = json!(disk.readonly);
        if !dirty_bitmaps.is_empty() {
            info["dirty-bitmaps"] = json!(dirty_bitmaps);
        }
        BlockDeviceInfo(info)
    }

    /// A snapshot `name` of a raw disk of `size` bytes.
    pub fn snapshot(name: &str, disk: &DiskConfig, size: u64) -> Self {
        BlockDeviceInfo(Self::of("snapshot-access", name, disk, size))
    }

    fn of(driver: &str, name: &str, disk: &DiskConfig, size: u64) -> Value {
        let file = disk.path.to_string_lossy();
        json!({
            "node-name": name,
            "file": file,
            "drv": driver,
            "ro": true,
            "encrypted": false,
            "detect_zeroes": "off",
            "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
            "write_threshold": 0,
            "backing_file_depth": 0,
            "cache": { "writeback": true, "direct": disk.options.cache == CacheMode::None, "no-flush": false },
            "image": { "filename": file, "format": "raw", "virtual-size": size },
        })
    }
}

/// One disk in the answer to `query-block`, in QEMU's nested shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct BlockInfo(Value);

impl BlockInfo {
    /// The disk with this id.
    pub fn new(id: &str, inserted: &BlockDeviceInfo) -> Self {
        BlockInfo(json!({
            "device": id,
            "qdev": id,
            "type": "unknown",
            "removable": false,
            "locked": false,
            "io-status": "ok",
            "inserted": inserted,
        }))
    }

    /// With this `io-status`; `ok` without.
    pub fn with_io_status(mut self, status: IoStatus) -> Self {
        self.0["io-status"] = json!(status);
        self
    }
}
