//! What becomes of a request that the image fails, and who hears of it. Names and meanings are QEMU's.

use std::io::{Error, ErrorKind};
use std::sync::atomic::{AtomicU8, Ordering};

use serde::Serialize;

use crate::vm::config::{DiskOptions, ReadErrorAction, WriteErrorAction};

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoOperation {
    /// Reading.
    Read,
    /// Anything that changes the image or makes changes durable.
    Write,
}

/// What is done about a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorAction {
    /// The guest gets an I/O error.
    Report,
    /// The guest is paused; the request stays in its queue and is done again when it goes on.
    Stop,
}

/// A failed request: the data of the event `BLOCK_IO_ERROR`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockIoError {
    /// The device; the disk's id.
    pub qom_path: String,
    /// The disk's id.
    pub device: String,
    /// The disk's id.
    pub node_name: String,
    /// What failed.
    pub operation: IoOperation,
    /// What is done about it.
    pub action: ErrorAction,
    /// Whether the storage is full.
    pub nospace: bool,
    /// What the system said.
    pub reason: String,
}

impl BlockIoError {
    /// A failure of the disk `id`.
    pub fn new(id: &str, options: DiskOptions, operation: IoOperation, error: &Error) -> Self {
        let nospace = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
        let stop = match operation {
            IoOperation::Read => options.rerror == ReadErrorAction::Stop,
            IoOperation::Write => match options.werror {
                WriteErrorAction::Enospc => nospace,
                WriteErrorAction::Report => false,
                WriteErrorAction::Stop => true,
            },
        };
        let action = if stop { ErrorAction::Stop } else { ErrorAction::Report };
        let [qom_path, device, node_name] = [(); 3].map(|()| id.to_owned());
        BlockIoError { qom_path, device, node_name, operation, action, nospace, reason: error.to_string() }
    }
}

/// Whether a disk waits, with the request that failed, for the guest to be resumed (QEMU's `BlockDeviceIoStatus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoStatus {
    /// It works.
    Ok,
    /// It failed.
    Failed,
    /// Its storage was full.
    NoSpace,
}

/// An [`IoStatus`] that threads share.
#[derive(Debug, Default)]
pub(super) struct SharedIoStatus(AtomicU8);

impl SharedIoStatus {
    pub(super) fn set(&self, status: IoStatus) {
        let code = match status {
            IoStatus::Ok => 0,
            IoStatus::Failed => 1,
            IoStatus::NoSpace => 2,
        };
        self.0.store(code, Ordering::Release);
    }

    pub(super) fn get(&self) -> IoStatus {
        match self.0.load(Ordering::Acquire) {
            0 => IoStatus::Ok,
            1 => IoStatus::Failed,
            _ => IoStatus::NoSpace,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_storage_pauses_and_other_errors_are_the_guest_s_unless_a_person_says_otherwise() {
        let [full, broken] = [libc::ENOSPC, libc::EIO].map(Error::from_raw_os_error);
        let (defaults, read, write) = (DiskOptions::default(), IoOperation::Read, IoOperation::Write);
        let stop = DiskOptions { werror: WriteErrorAction::Stop, rerror: ReadErrorAction::Stop, ..defaults };
        let report = DiskOptions { werror: WriteErrorAction::Report, ..defaults };
        for (options, operation, error, action) in [
            (defaults, write, &full, ErrorAction::Stop),
            (defaults, write, &broken, ErrorAction::Report),
            (defaults, read, &full, ErrorAction::Report),
            (defaults, read, &broken, ErrorAction::Report),
            (stop, write, &broken, ErrorAction::Stop),
            (stop, read, &broken, ErrorAction::Stop),
            (report, write, &full, ErrorAction::Report),
        ] {
            assert_eq!(BlockIoError::new("root", options, operation, error).action, action, "{options:?} {operation:?} {error}");
        }
        let event = serde_json::to_value(BlockIoError::new("root", defaults, write, &full)).unwrap();
        assert_eq!(
            event,
            serde_json::json!({
                "qom-path": "root", "device": "root", "node-name": "root", "operation": "write", "action": "stop", "nospace": true,
                "reason": "No space left on device (os error 28)",
            })
        );
    }
}
