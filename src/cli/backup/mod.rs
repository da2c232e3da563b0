//! `ferry backup`: full and incremental backups of a running guest's disk, and images made of them again.
//!
//! | file | concern |
//! |---|---|
//! | `take` | one backup, from its point in time to its file |
//! | `bitmaps` | what the disk's bitmaps say of the backups before, and how a backup changes them |
//! | `copy` | an export read into a file |
//! | `display` | what is shown meanwhile |

mod bitmaps;
mod copy;
mod display;
mod take;

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, Subcommand};
use serde_json::json;
use thiserror::Error;

use super::arguments::parse_address;
use super::{CliError, format, interrupt};
use crate::backup::restore::{Chain, RestoreError};
use display::Display;

#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "\
Examples:
  ferry backup --qmp guest.sock root --bitmap nightly --to sunday.img        (the first one is a full one)
  ferry backup --qmp guest.sock root --bitmap nightly --to monday.inc        (what has changed since)
  ferry backup restore --to root.img sunday.img monday.inc

A backup is the disk at one moment; the guest goes on meanwhile. A full backup is a raw image, which every tool can read; an incremental one is \
for `ferry backup restore`. The bitmap records what the guest changes between backups; it and the names that begin with its name and a dot are \
this command's. After the bitmap was cleared or removed by others, take a full backup. It goes along when the guest moves: the next backup is \
taken at the destination. Ctrl-C, or the end of this command in any other way, loses nothing: what it would have saved is in the next backup."
)]
pub(super) struct BackupArguments {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    take: Option<TakeArguments>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make an image of a full backup and the incremental ones after it
    Restore(RestoreArguments),
}

#[derive(Debug, Args)]
pub(super) struct TakeArguments {
    /// Control socket of the running Ferry
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// Id of the disk
    disk: String,
    /// Dirty bitmap that records what changes between backups; made by the first one, and persistent where the disk allows it
    #[arg(long, value_name = "NAME")]
    bitmap: String,
    /// File to write; it appears when the backup is whole
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// Take a full backup; without this, only where there is none to build on
    #[arg(long, conflicts_with = "incremental")]
    full: bool,
    /// Take an incremental backup, or none
    #[arg(long)]
    incremental: bool,
    /// Replace the file
    #[arg(long)]
    force: bool,
    /// Address of the NBD server, if it runs elsewhere than at a unix socket beside the control socket
    #[arg(long, value_name = "URI", value_parser = parse_address)]
    listen: Option<String>,
}

#[derive(Debug, Args)]
struct RestoreArguments {
    /// Raw image to write; it appears when it is whole
    #[arg(long, value_name = "IMAGE")]
    to: PathBuf,
    /// The full backup
    full: PathBuf,
    /// The incremental backups after it, the oldest first
    incrementals: Vec<PathBuf>,
    /// Replace the image
    #[arg(long)]
    force: bool,
}

/// Why there is no backup, or no image.
#[derive(Debug, Error)]
pub(super) enum BackupError {
    #[error("there is no disk '{0}'; `ferry bitmap list` shows disks with bitmaps")]
    NoDisk(String),
    #[error("another `ferry backup` with the bitmap '{0}' is under way")]
    UnderWay(String),
    #[error("there is no backup with the bitmap '{bitmap}' to build on{why}; take a full one: --full")]
    NothingToBuildOn { bitmap: String, why: &'static str },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("no random number for the backup's id: {0}")]
    Random(std::io::Error),
    #[error("cannot connect to the NBD server: {0}")]
    Connect(std::io::Error),
    #[error("{0}; there is no backup, and nothing is lost: the next one has what this one would have had")]
    Nbd(#[from] crate::block::nbd::client::ClientError),
    #[error(
        "the guest moved to another host, and its disk with it, before the backup was whole; nothing is lost: take it again where the guest is"
    )]
    Moved,
    #[error("interrupted; there is no backup, and the next one has what this one would have had")]
    Interrupted,
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// Does what `ferry backup` was asked to.
pub(super) fn backup(arguments: BackupArguments) -> Result<(), CliError> {
    // Before there is anything to clean up.
    interrupt::catch().map_err(|source| CliError::Write { what: "a signal handler".into(), source })?;
    match arguments {
        BackupArguments { action: Some(Action::Restore(arguments)), .. } => Ok(restore(arguments).map_err(BackupError::from)?),
        BackupArguments { take: Some(arguments), .. } => take::take(&arguments),
        // Not after `subcommand_negates_reqs`: what is required is there where no subcommand is.
        BackupArguments { .. } => Ok(()),
    }
}

fn restore(arguments: RestoreArguments) -> Result<(), RestoreError> {
    let began = Instant::now();
    let chain = Chain::open(&arguments.full, &arguments.incrementals)?;
    let mut display = Display::new();
    let restored = chain.restore(&arguments.to, arguments.force, |at, total| {
        display.progress(at, total, "restoring");
        !interrupt::take()
    })?;
    let time = began.elapsed();
    display.end(
        &json!({ "event": "RESTORED", "data": { "file": arguments.to, "size": restored.size, "stored": restored.stored, "seconds": time.as_secs_f64() } }),
        &format!(
            "{}: {} restored from {} backups in {}, {} on storage",
            arguments.to.display(),
            format::bytes(restored.size),
            1 + arguments.incrementals.len(),
            format::microseconds(time.as_micros() as u64),
            format::bytes(restored.stored)
        ),
    );
    Ok(())
}
