//! The command line: arguments in, progress and reports out.

mod arguments;
mod backup;
mod bandwidth;
mod bitmap;
pub mod console;
mod control;
mod disk;
mod doctor;
mod duration;
mod export;
mod format;
mod interrupt;
mod migrate;
pub mod options;
pub mod serial;
mod size;
mod start;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use thiserror::Error;

use crate::qmp::client::ClientError;
use arguments::{Arguments, Subcommand};

/// Why a command did not do what it should: one sentence for stderr.
#[derive(Debug, Error)]
enum CliError {
    /// A control command failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A file or the terminal.
    #[error("cannot write {what}: {source}")]
    Write {
        /// Which file.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The guest could not be run or received.
    #[error("{0}")]
    Guest(String),
    /// No backup was made, or none restored.
    #[error(transparent)]
    Backup(#[from] backup::BackupError),
    /// A migration ended otherwise than by completing.
    #[error("{0}")]
    Migration(String),
}

/// Whether `ferry` takes these arguments, the program's name first; does nothing with them. An error is what its user would read.
pub fn check(arguments: impl Iterator<Item = OsString>) -> Result<(), String> {
    Arguments::try_parse_from(arguments).map(drop).map_err(|error| error.to_string())
}

/// Runs `ferry` with the process's arguments. Exit status: 0 done, 1 failed (with one sentence on stderr), 2 wrong usage.
pub fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Subcommand::Run(arguments) => start::run(arguments.into_options()),
        Subcommand::Receive(arguments) => start::receive(arguments.into_options()),
        Subcommand::Migrate(arguments) => migrate::migrate(&arguments),
        Subcommand::Status(target) => control::status(&target.qmp),
        Subcommand::Pause(target) => control::pause(&target.qmp),
        Subcommand::Resume(target) => control::resume(&target.qmp),
        Subcommand::Powerdown(target) => control::powerdown(&target.qmp),
        Subcommand::Bitmap(arguments) => bitmap::bitmap(arguments),
        Subcommand::Backup(arguments) => backup::backup(arguments),
        Subcommand::Export(arguments) => export::export(arguments),
        Subcommand::Cancel(target) => control::cancel(&target.qmp),
        Subcommand::StartPostcopy(target) => control::start_postcopy(&target.qmp),
        Subcommand::Continue(target) => control::continue_switchover(&target.qmp),
        Subcommand::Recover(arguments) => migrate::recover(arguments),
        Subcommand::Quit(target) => control::quit(&target.qmp),
        Subcommand::Doctor(arguments) => return doctor::doctor(arguments.json),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ferry: {error}");
            ExitCode::FAILURE
        }
    }
}
