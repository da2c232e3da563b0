//! `ferry bitmap`: the dirty bitmaps of a running guest's disks.

use std::convert::Infallible;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::arguments::Target;
use super::control::execute;
use super::{CliError, size};
use crate::block::dirty_bitmap::Granularity;
use crate::qmp::Command;
use crate::qmp::client::Client;
use crate::qmp::command::{BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockDirtyBitmapMergeSource};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bitmap add --qmp guest.sock root nightly --persistent
  ferry bitmap list --qmp guest.sock
  ferry bitmap merge --qmp guest.sock root weekly monday tuesday data:wednesday

A dirty bitmap records which parts of a disk the guest changes, for incremental backups. A persistent one is kept beside the image, in \
IMAGE.bitmaps, while no Ferry runs. One that a Ferry had when it was killed, or whose image was changed by others since, is `inconsistent`: \
it can only be removed.")]
pub(super) struct BitmapArguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show every disk's bitmaps, and how many bytes of the disk each has as dirty
    List(Target),
    /// Give a disk a bitmap, which records writes from now on
    Add(AddArguments),
    /// Remove a disk's bitmap
    Remove(Bitmap),
    /// Forget what a bitmap has recorded
    Clear(Bitmap),
    /// Make a bitmap record writes again
    Enable(Bitmap),
    /// Make a bitmap ignore writes; it keeps what it has
    Disable(Bitmap),
    /// Add what other bitmaps have recorded to a bitmap
    Merge(MergeArguments),
}

#[derive(Debug, Args)]
struct AddArguments {
    #[command(flatten)]
    bitmap: Bitmap,
    /// Bytes of disk to a bit: a power of two, 512 to 2G
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = parse_granularity)]
    granularity: u32,
    /// Keep it beside the image, in IMAGE.bitmaps, when Ferry ends
    #[arg(long)]
    persistent: bool,
    /// Do not record writes yet
    #[arg(long)]
    disabled: bool,
}

#[derive(Debug, Args)]
struct MergeArguments {
    #[command(flatten)]
    target: Bitmap,
    /// Bitmaps to take from: NAME on the same disk, DISK:NAME on another of the same size
    #[arg(value_name = "BITMAP", required = true, value_parser = parse_source)]
    sources: Vec<BlockDirtyBitmapMergeSource>,
}

/// A bitmap by name.
#[derive(Debug, Args)]
struct Bitmap {
    /// Control socket of the running Ferry
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// Id of the disk
    disk: String,
    /// Name of the bitmap
    name: String,
}

impl Bitmap {
    fn execute(self, command: impl FnOnce(BlockDirtyBitmap) -> Command) -> Result<(), CliError> {
        execute(&self.qmp, &command(BlockDirtyBitmap { node: self.disk, name: self.name }))
    }
}

fn parse_source(text: &str) -> Result<BlockDirtyBitmapMergeSource, Infallible> {
    Ok(match text.split_once(':') {
        Some((disk, name)) => BlockDirtyBitmapMergeSource::External(BlockDirtyBitmap { node: disk.into(), name: name.into() }),
        None => BlockDirtyBitmapMergeSource::Local(text.into()),
    })
}

fn parse_granularity(text: &str) -> Result<u32, String> {
    let granularity = Granularity::new(size::parse(text)?).map_err(|error| error.to_string())?;
    u32::try_from(granularity.bytes()).map_err(|error| error.to_string())
}

/// Carries out what `ferry bitmap` was asked to.
pub(super) fn bitmap(arguments: BitmapArguments) -> Result<(), CliError> {
    match arguments.action {
        Action::List(target) => {
            print!("{}", table(&Client::connect(&target.qmp)?.execute(&Command::QueryBlock)?));
            Ok(())
        }
        Action::Add(AddArguments { bitmap: Bitmap { qmp, disk, name }, granularity, persistent, disabled }) => {
            let granularity = Some(granularity);
            let add = BlockDirtyBitmapAdd { node: disk, name, granularity, persistent, disabled };
            execute(&qmp, &Command::BlockDirtyBitmapAdd(add))
        }
        Action::Remove(bitmap) => bitmap.execute(Command::BlockDirtyBitmapRemove),
        Action::Clear(bitmap) => bitmap.execute(Command::BlockDirtyBitmapClear),
        Action::Enable(bitmap) => bitmap.execute(Command::BlockDirtyBitmapEnable),
        Action::Disable(bitmap) => bitmap.execute(Command::BlockDirtyBitmapDisable),
        Action::Merge(MergeArguments { target: Bitmap { qmp, disk, name }, sources }) => {
            execute(&qmp, &Command::BlockDirtyBitmapMerge(BlockDirtyBitmapMerge { node: disk, target: name, bitmaps: sources }))
        }
    }
}

/// The bitmaps in an answer to `query-block`, a line each.
fn table(blocks: &Value) -> String {
    let mut table = format!("{:<20} {:<20} {:>12} {:>14}  state\n", "disk", "bitmap", "granularity", "dirty bytes");
    for block in blocks.as_array().into_iter().flatten() {
        let disk = block["device"].as_str().unwrap_or_default();
        for bitmap in block["inserted"]["dirty-bitmaps"].as_array().into_iter().flatten() {
            let name = bitmap["name"].as_str().unwrap_or_default();
            let is = |key: &str| bitmap[key] == true;
            let state = match (is("inconsistent"), is("recording")) {
                (true, _) => "inconsistent",
                (false, true) => "recording",
                (false, false) => "disabled",
            };
            let busy = if is("busy") { ", busy" } else { "" };
            let persistent = if is("persistent") { ", persistent" } else { "" };
            table += &format!("{disk:<20} {name:<20} {:>12} {:>14}  {state}{busy}{persistent}\n", bitmap["granularity"], bitmap["count"]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn table_has_a_line_for_each_bitmap() {
        let bitmap = |name, [recording, busy, persistent, inconsistent]: [bool; 4]| {
            json!({ "name": name, "count": 131072, "granularity": 65536, "recording": recording, "busy": busy, "persistent": persistent,
                "inconsistent": inconsistent })
        };
        let states = [[true, false, false, false], [true, true, false, false], [false, false, true, false], [false, false, true, true]];
        let bitmaps: Vec<_> = (0..).zip(states).map(|(number, state)| bitmap(format!("b{number}"), state)).collect();
        let table = table(&json!([{ "device": "d0", "inserted": { "dirty-bitmaps": bitmaps } }, { "device": "d1", "inserted": {} }]));
        let words: Vec<Vec<_>> = table.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words[0], ["d0", "b0", "65536", "131072", "recording"]);
        assert_eq!(words[1][4..], ["recording,", "busy"]);
        assert_eq!(words[2][4..], ["disabled,", "persistent"]);
        assert_eq!(words[3][4..], ["inconsistent,", "persistent"]);
        assert_eq!(words.len(), 4);
    }

    #[test]
    fn sources_name_their_disk_or_not() {
        let external = BlockDirtyBitmap { node: "data".into(), name: "a:b".into() };
        assert_eq!(parse_source("data:a:b"), Ok(BlockDirtyBitmapMergeSource::External(external)));
        assert_eq!(parse_source("a"), Ok(BlockDirtyBitmapMergeSource::Local("a".into())));
    }
}
