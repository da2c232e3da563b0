//! Typed answers of the query commands, in QEMU's shapes.

use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use crate::block::io_error::IoStatus;

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
    /// Always false: raw images have no place for bitmaps.
    pub persistent: bool,
}

/// One disk in the answer to `query-block`, in QEMU's nested shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct BlockInfo(Value);

impl BlockInfo {
    /// A raw disk `id` of `size` bytes at `path`.
    pub fn new(id: &str, path: &Path, size: u64, readonly: bool, dirty_bitmaps: &[BlockDirtyInfo]) -> Self {
        let file = path.to_string_lossy();
        BlockInfo(json!({
            "device": id,
            "qdev": id,
            "type": "unknown",
            "removable": false,
            "locked": false,
            "io-status": "ok",
            "inserted": {
                "node-name": id,
                "file": file,
                "drv": "raw",
                "ro": readonly,
                "image": { "filename": file, "format": "raw", "virtual-size": size },
                "dirty-bitmaps": dirty_bitmaps,
            },
        }))
    }

    /// With this `io-status`; `ok` without.
    pub fn with_io_status(mut self, status: IoStatus) -> Self {
        self.0["io-status"] = json!(status);
        self
    }
}
