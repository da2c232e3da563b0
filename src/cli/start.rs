//! Hands the options over to the monitor.

use super::CliError;
use super::options::{ReceiveOptions, RunOptions};
use crate::vmm;

/// Boots a guest and runs it to its end.
pub(super) fn run(options: RunOptions) -> Result<(), CliError> {
    vmm::run(options).map_err(|error| CliError::Guest(error.to_string()))
}

/// Waits for a guest and runs it to its end.
pub(super) fn receive(options: ReceiveOptions) -> Result<(), CliError> {
    vmm::receive(options).map_err(|error| CliError::Guest(error.to_string()))
}
