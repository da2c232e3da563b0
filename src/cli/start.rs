//! Hands the options over to the monitor.

use super::CliError;
use super::options::{ReceiveOptions, RunOptions};

/// Boots a guest and runs it to its end.
pub(super) fn run(options: RunOptions) -> Result<(), CliError> {
    Err(CliError::Guest(format!("cannot run {} yet: the monitor is not part of this build", options.config.name)))
}

/// Waits for a guest and runs it to its end.
pub(super) fn receive(options: ReceiveOptions) -> Result<(), CliError> {
    Err(CliError::Guest(format!("cannot receive at {} yet: the monitor is not part of this build", options.listen)))
}
