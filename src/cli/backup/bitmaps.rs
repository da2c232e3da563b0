//! What a disk's dirty bitmaps say of the backups before, and how a backup changes them. Bitmaps survive what the guest survives and go along
//! when it moves, so there is no other place for this:
//!
//! | name | |
//! |---|---|
//! | `B` | what has changed since the last backup |
//! | `B.since.ID` | empty; says that `B` has all that was changed since the backup `ID` |
//! | `B.taking.ID` | what had changed before the point in time of the backup `ID`, which is being taken, or was not ended |
//! | `B.before.ID` | empty; says that `B` and `B.taking.*` together have all that was changed since the backup `ID` |
//!
//! If any of them gets lost, on the way to another host say, what is left says too little, and the next backup is a full one; never too much.

use serde_json::Value;

use super::BackupError;
use crate::backup::id::BackupId;
use crate::block::nbd::catalogue::{ExportError, RemoveMode};
use crate::cli::CliError;
use crate::qmp::Command;
use crate::qmp::block_export::BlockExportDel;
use crate::qmp::client::{Client, ClientError};
use crate::qmp::command::{
    BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockDirtyBitmapMergeSource, BlockSnapshot, Transaction,
    TransactionAction,
};

/// Of bitmaps that stay empty: the largest there is, so that they take no memory.
const MARKER_GRANULARITY: u32 = 2 << 30;
/// Backups that a bitmap is said to follow, beyond which those that were killed do not count any more.
const MAX_PARENTS: usize = 64;
const DEFAULT_GRANULARITY: u32 = 64 << 10;

/// Names on one disk.
#[derive(Clone, Debug)]
pub(super) struct Names {
    pub disk: String,
    pub bitmap: String,
}

/// The disk's bitmaps, as far as they have to do with one series of backups.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct State {
    /// `B` itself, if it is there.
    bitmap: Option<Bitmap>,
    /// Ids in `B.since.*`.
    since: Vec<BackupId>,
    /// Ids in `B.taking.*`.
    taking: Vec<BackupId>,
    /// Ids in `B.before.*`.
    before: Vec<BackupId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bitmap {
    granularity: u32,
    persistent: bool,
    recording: bool,
    inconsistent: bool,
}

/// The point in time of a backup, and what undoes it.
#[derive(Debug)]
pub(super) struct Point {
    /// The name of all that belongs to this backup.
    pub id: BackupId,
    /// Whether `B` is new with it.
    pub new: bool,
    /// The backups that an incremental one can follow.
    pub parents: Vec<BackupId>,
    pub granularity: u32,
    persistent: bool,
}

impl Names {
    /// Of the bitmap that has what had changed before.
    pub fn taking(&self, id: BackupId) -> String {
        format!("{}.taking.{id}", self.bitmap)
    }

    fn since(&self, id: BackupId) -> String {
        format!("{}.since.{id}", self.bitmap)
    }

    fn before(&self, id: BackupId) -> String {
        format!("{}.before.{id}", self.bitmap)
    }

    /// Of a backup's snapshot and export. The names of snapshots are short.
    pub fn snapshot(id: BackupId) -> String {
        format!("backup-{:.16}", id.to_string())
    }

    fn of(&self, name: String) -> BlockDirtyBitmap {
        BlockDirtyBitmap { node: self.disk.clone(), name }
    }

    fn remove(&self, name: String) -> TransactionAction {
        TransactionAction::BlockDirtyBitmapRemove(self.of(name))
    }

    fn add(&self, name: String, granularity: u32, persistent: bool, disabled: bool) -> TransactionAction {
        let granularity = Some(granularity);
        TransactionAction::BlockDirtyBitmapAdd(BlockDirtyBitmapAdd { node: self.disk.clone(), name, granularity, persistent, disabled })
    }

    fn mark(&self, name: String, persistent: bool) -> TransactionAction {
        self.add(name, MARKER_GRANULARITY, persistent, true)
    }

    fn merge(&self, target: String, source: String) -> TransactionAction {
        let bitmaps = vec![BlockDirtyBitmapMergeSource::Local(source)];
        TransactionAction::BlockDirtyBitmapMerge(BlockDirtyBitmapMerge { node: self.disk.clone(), target, bitmaps })
    }

    /// Looks at the disk's bitmaps.
    pub fn state(&self, client: &mut Client) -> Result<State, CliError> {
        let blocks = client.execute(&Command::QueryBlock)?;
        let mut disks = blocks.as_array().into_iter().flatten();
        let disk = disks.find(|block| block["device"] == self.disk.as_str()).ok_or_else(|| BackupError::NoDisk(self.disk.clone()))?;
        Ok(self.read(&disk["inserted"]["dirty-bitmaps"]))
    }

    fn read(&self, bitmaps: &Value) -> State {
        let mut state = State { bitmap: None, since: Vec::new(), taking: Vec::new(), before: Vec::new() };
        for bitmap in bitmaps.as_array().into_iter().flatten() {
            let Some(rest) = bitmap["name"].as_str().and_then(|name| name.strip_prefix(&self.bitmap)) else { continue };
            let is = |key: &str| bitmap[key] == true;
            if rest.is_empty() {
                let granularity = bitmap["granularity"].as_u64().and_then(|bytes| bytes.try_into().ok()).unwrap_or(DEFAULT_GRANULARITY);
                let (persistent, recording, inconsistent) = (is("persistent"), is("recording"), is("inconsistent"));
                state.bitmap = Some(Bitmap { granularity, persistent, recording, inconsistent });
                continue;
            }
            for (prefix, ids) in [(".since.", &mut state.since), (".taking.", &mut state.taking), (".before.", &mut state.before)] {
                ids.extend(rest.strip_prefix(prefix).and_then(|id| id.parse::<BackupId>().ok()));
            }
        }
        state
    }

    /// Brings together again what a backup that came to no end has left, so that it is as if it had never begun. With [`RemoveMode::Safe`] a
    /// backup that goes on is left alone, and that is an error.
    pub fn recover(&self, client: &mut Client, mode: RemoveMode) -> Result<(), CliError> {
        let state = self.state(client)?;
        for id in &state.taking {
            let name = Self::snapshot(*id);
            match client.execute(&Command::BlockExportDel(BlockExportDel { id: name.clone(), mode })) {
                Err(ClientError::Command(error)) if error.desc == ExportError::StillInUse(name.clone()).to_string() => {
                    return Err(BackupError::UnderWay(self.bitmap.clone()).into());
                }
                // It is not here where the guest was at another host then.
                Ok(_) | Err(ClientError::Command(_)) => {}
                Err(error) => return Err(error.into()),
            }
            match client.execute(&Command::BlockSnapshotRemove(BlockSnapshot { node: self.disk.clone(), name })) {
                Ok(_) | Err(ClientError::Command(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // Whoever is gone may have been killed when its file was there, and only this was missing.
        execute(client, self.recovery(&state, mode == RemoveMode::Safe))
    }

    /// `may_have_ended`: whether the file of the backup that left this can be there.
    fn recovery(&self, state: &State, may_have_ended: bool) -> Vec<TransactionAction> {
        let mut actions = Vec::new();
        let bitmap = state.bitmap.filter(Bitmap::is_usable);
        for id in &state.taking {
            if bitmap.is_some() {
                actions.push(self.merge(self.bitmap.clone(), self.taking(*id)));
            }
            actions.push(self.remove(self.taking(*id)));
        }
        for id in &state.before {
            actions.push(self.remove(self.before(*id)));
        }
        // Without the other part of what was changed since, the bitmap does not follow any backup.
        if let (Some(bitmap), false) = (bitmap, state.taking.is_empty() || state.before.is_empty()) {
            // What follows the backups before also follows one that had only a part of it.
            let ended = may_have_ended && state.before.len() < MAX_PARENTS;
            let known = state.before.iter().chain(state.taking.iter().filter(|_| ended)).filter(|id| !state.since.contains(id));
            actions.extend(known.map(|id| self.mark(self.since(*id), bitmap.persistent)));
        }
        actions
    }

    /// Makes the point in time at which the disk is backed up: the snapshot `backup-ID`, and from then on `B` begins anew.
    pub fn begin(&self, client: &mut Client, state: &State, id: BackupId) -> Result<Point, CliError> {
        if let Some(bitmap) = state.bitmap.filter(Bitmap::is_usable) {
            execute(client, self.beginning(state, bitmap, id))?;
            let Bitmap { granularity, persistent, .. } = bitmap;
            return Ok(Point { id, new: false, parents: state.since.clone(), granularity, persistent });
        }
        let granularity = state.bitmap.map_or(DEFAULT_GRANULARITY, |bitmap| bitmap.granularity);
        let point = |persistent| Point { id, new: true, parents: Vec::new(), granularity, persistent };
        match execute(client, self.first(state, id, granularity, true)) {
            Ok(()) => Ok(point(true)),
            Err(CliError::Client(ClientError::Command(error))) if error.desc.starts_with("Can't make bitmap") => {
                execute(client, self.first(state, id, granularity, false))?;
                Ok(point(false))
            }
            Err(error) => Err(error),
        }
    }

    fn beginning(&self, state: &State, bitmap: Bitmap, id: BackupId) -> Vec<TransactionAction> {
        let taking = self.taking(id);
        let mut actions = vec![
            self.add(taking.clone(), bitmap.granularity, bitmap.persistent, true),
            self.merge(taking, self.bitmap.clone()),
            TransactionAction::BlockDirtyBitmapClear(self.of(self.bitmap.clone())),
        ];
        for id in &state.since {
            actions.extend([self.remove(self.since(*id)), self.mark(self.before(*id), bitmap.persistent)]);
        }
        actions.push(self.freeze(id));
        actions
    }

    /// Begins with a new `B`.
    fn first(&self, state: &State, id: BackupId, granularity: u32, persistent: bool) -> Vec<TransactionAction> {
        let old = state.bitmap.map(|_| self.bitmap.clone()).into_iter().chain(state.since.iter().map(|id| self.since(*id)));
        let mut actions: Vec<_> = old.map(|name| self.remove(name)).collect();
        actions.push(self.add(self.bitmap.clone(), granularity, persistent, false));
        // So that what this backup leaves is found if it comes to no end.
        actions.push(self.add(self.taking(id), granularity, persistent, true));
        actions.push(self.freeze(id));
        actions
    }

    fn freeze(&self, id: BackupId) -> TransactionAction {
        TransactionAction::BlockSnapshotAdd(BlockSnapshot { node: self.disk.clone(), name: Self::snapshot(id) })
    }

    /// The backup's file is there under the id `done`: `B` has what was changed since. Not before, so that at any time the files that are there
    /// can be followed.
    pub fn end(&self, client: &mut Client, point: &Point, done: BackupId) -> Result<(), CliError> {
        let mut actions = vec![self.remove(self.taking(point.id))];
        actions.extend(point.parents.iter().map(|id| self.remove(self.before(*id))));
        actions.push(self.mark(self.since(done), point.persistent));
        execute(client, actions)
    }

    /// There is no backup: everything is as before.
    pub fn undo(&self, client: &mut Client, point: &Point) -> Result<(), CliError> {
        self.recover(client, RemoveMode::Hard)?;
        if point.new { execute(client, vec![self.remove(self.bitmap.clone())]) } else { Ok(()) }
    }
}

impl Bitmap {
    fn is_usable(&self) -> bool {
        self.recording && !self.inconsistent
    }
}

impl State {
    /// Why no incremental backup can be taken, if so; empty words where there was none before.
    pub fn nothing_to_build_on(&self) -> Option<&'static str> {
        match self.bitmap {
            Some(bitmap) if bitmap.inconsistent => {
                Some(" (the bitmap is inconsistent: a Ferry was killed, or the image changed by others)")
            }
            Some(bitmap) if !bitmap.recording => Some(" (the bitmap was disabled)"),
            Some(_) if !self.since.is_empty() => None,
            _ => Some(""),
        }
    }
}

fn execute(client: &mut Client, actions: Vec<TransactionAction>) -> Result<(), CliError> {
    if !actions.is_empty() {
        client.execute(&Command::Transaction(Transaction { actions, properties: None }))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
