//! Requests that the image fails.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::block::disk::Disk;
use crate::block::io_error::{BlockIoError, ErrorAction, IoOperation, IoStatus};

/// Errors that are reported to the guest are told no faster.
const INTERVAL: Duration = Duration::from_secs(1);

/// Decides what becomes of a failed request, and tells it.
pub(super) struct Errors {
    on_error: Box<dyn Fn(BlockIoError) + Send + Sync>,
    told: Mutex<Option<Instant>>,
}

impl Errors {
    pub(super) fn new(on_error: impl Fn(BlockIoError) + Send + Sync + 'static) -> Self {
        Errors { on_error: Box::new(on_error), told: Mutex::default() }
    }

    /// A request of `disk` has failed.
    pub(super) fn failed(&self, disk: &Disk, operation: IoOperation, error: &io::Error) -> ErrorAction {
        let error = BlockIoError::new(&disk.config().id, disk.config().options, operation, error);
        let action = error.action;
        if action == ErrorAction::Stop {
            // Before anybody hears of it: who stops the guest looks here whether it was resumed already.
            disk.set_io_status(if error.nospace { IoStatus::NoSpace } else { IoStatus::Failed });
        }
        if action == ErrorAction::Stop || self.is_due() {
            (self.on_error)(error);
        }
        action
    }

    fn is_due(&self) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let due = told.is_none_or(|at| at.elapsed() >= INTERVAL);
        if due {
            *told = Some(Instant::now());
        }
        due
    }
}

#[cfg(test)]
mod tests;
