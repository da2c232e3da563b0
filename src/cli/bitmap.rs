//! `ferry bitmap`: the dirty bitmaps of a running guest's disks.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::arguments::Target;
use super::control::execute;
use super::{CliError, size};
use crate::block::dirty_bitmap::Granularity;
use crate::qmp::Command;
use crate::qmp::client::Client;
use crate::qmp::command::{BlockDirtyBitmap, BlockDirtyBitmapAdd};

#[derive(Debug, Args)]
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
}

#[derive(Debug, Args)]
struct AddArguments {
    #[command(flatten)]
    bitmap: Bitmap,
    /// Bytes of disk to a bit: a power of two, 512 to 2G
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = parse_granularity)]
    granularity: u32,
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
        Action::Add(AddArguments { bitmap: Bitmap { qmp, disk, name }, granularity }) => {
            let granularity = Some(granularity);
            let add = BlockDirtyBitmapAdd { node: disk, name, granularity, persistent: false, disabled: false };
            execute(&qmp, &Command::BlockDirtyBitmapAdd(add))
        }
        Action::Remove(Bitmap { qmp, disk, name }) => {
            execute(&qmp, &Command::BlockDirtyBitmapRemove(BlockDirtyBitmap { node: disk, name }))
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
            let state = match (bitmap["busy"] == true, bitmap["recording"] == true) {
                (true, _) => "busy",
                (false, true) => "recording",
                (false, false) => "disabled",
            };
            table += &format!("{disk:<20} {name:<20} {:>12} {:>14}  {state}\n", bitmap["granularity"], bitmap["count"]);
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
        let bitmap =
            |name, busy, recording| json!({ "name": name, "count": 131072, "granularity": 65536, "recording": recording, "busy": busy });
        let bitmaps = [bitmap("b0", false, true), bitmap("b1", true, true), bitmap("b2", false, false)];
        let table = table(&json!([{ "device": "d0", "inserted": { "dirty-bitmaps": bitmaps } }, { "device": "d1" }]));
        let words: Vec<Vec<_>> = table.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words[0], ["d0", "b0", "65536", "131072", "recording"]);
        assert_eq!((words[1][4], words[2][4], words.len()), ("busy", "disabled", 3));
    }
}
