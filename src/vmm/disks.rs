//! The guest's disks: what QMP shows of them and does to their dirty bitmaps, and their end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use super::monitor::generic;
use super::{lock, snapshots};
use crate::block::dirty_bitmap::{BitmapError, Granularity, HeldBitmaps};
use crate::block::disk::Disk;
use crate::block::snapshot::{PreparedSnapshot, SnapshotError};
use crate::qmp::QmpError;
use crate::qmp::command::{BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMergeSource, BlockSnapshot, TransactionAction};
use crate::qmp::response::{BlockDeviceInfo, BlockDirtyBitmapSha256, BlockDirtyInfo, BlockInfo};

/// QEMU's words where a bitmap is looked for.
fn node_not_found(node: &str) -> QmpError {
    QmpError::generic(format!("Node '{node}' not found"))
}

fn find<'a>(disks: &'a [Arc<Disk>], node: &str) -> Option<&'a Arc<Disk>> {
    disks.iter().find(|disk| disk.config().id == node)
}

/// Answer to `query-block`.
pub fn block_infos(disks: &[Arc<Disk>]) -> Vec<BlockInfo> {
    disks.iter().map(|disk| BlockInfo::new(&disk.config().id, &block_device_info(disk)).with_io_status(disk.io_status())).collect()
}

/// Answer to `query-named-block-nodes`: each disk and its snapshots.
pub fn named_block_nodes(disks: &[Arc<Disk>]) -> Vec<BlockDeviceInfo> {
    let snapshots = |disk: &Disk| -> Vec<_> {
        let info = |name: String| BlockDeviceInfo::snapshot(&name, disk.config(), disk.size());
        disk.snapshots().names().into_iter().map(info).collect()
    };
    disks.iter().flat_map(|disk| std::iter::once(block_device_info(disk)).chain(snapshots(disk))).collect()
}

/// Answer to `x-debug-block-dirty-bitmap-sha256`.
pub fn bitmap_sha256(disks: &[Arc<Disk>], bitmap: &BlockDirtyBitmap) -> Result<BlockDirtyBitmapSha256, QmpError> {
    let disk = find(disks, &bitmap.node).ok_or_else(|| node_not_found(&bitmap.node))?;
    disk.bitmaps().sha256(&bitmap.name).map(|sha256| BlockDirtyBitmapSha256 { sha256 }).map_err(generic)
}

/// Stores persistent bitmaps and lets the images go, when the guest has ended.
pub fn close(disks: &[Arc<Disk>]) {
    for disk in disks {
        if let Err(error) = disk.close() {
            eprintln!("ferry: {error}; what its persistent dirty bitmaps recorded is lost\r");
        }
    }
}

/// Who changes dirty bitmaps and adds snapshots for QMP: one transaction at a time, so that the names in the sidecars are those of the bitmaps
/// in memory, and no two snapshots have the same name.
#[derive(Debug, Default)]
pub struct Transactions(Mutex<()>);

impl Transactions {
    /// Carries out `actions` on `disks`, all of them or none, between two writes of the guest.
    pub fn carry_out(&self, disks: &[Arc<Disk>], actions: &[TransactionAction]) -> Result<(), QmpError> {
        let _alone = lock(&self.0);
        let mut concerned = BTreeMap::new();
        for action in actions {
            for node in action.nodes() {
                let missing = || match action {
                    TransactionAction::BlockDirtyBitmapAdd(_) | TransactionAction::BlockSnapshotAdd(_) => QmpError::device_not_found(node),
                    _ => node_not_found(node),
                };
                concerned.insert(node, find(disks, node).ok_or_else(missing)?);
            }
        }
        let prepared = prepare_snapshots(actions, disks, &concerned)?;
        let listed = list_added(actions, &concerned)?;
        let done = carry_out(actions, &concerned, prepared);
        let removed = actions.iter().filter_map(|action| match action {
            TransactionAction::BlockDirtyBitmapRemove(bitmap) => Some(bitmap.node.as_str()),
            _ => None,
        });
        let stale: BTreeSet<&str> = if done.is_ok() { removed.collect() } else { listed };
        let stale = stale.iter().filter_map(|node| concerned.get(node));
        for disk in stale.filter(|disk| disk.refuses_persistent().is_none() && disk.with_io(|_| Ok(())).is_ok()) {
            // A name too much is shown after a crash, and can be removed then.
            let _ = disk.list_persistent(&[]).inspect_err(|error| eprintln!("ferry: {error}\r"));
        }
        done
    }
}

/// Makes ready what takes its time or can fail of the snapshots, by disk.
fn prepare_snapshots<'a>(
    actions: &'a [TransactionAction],
    disks: &[Arc<Disk>],
    concerned: &BTreeMap<&str, &Arc<Disk>>,
) -> Result<Vec<(&'a str, PreparedSnapshot)>, QmpError> {
    let (mut prepared, mut names) = (Vec::new(), BTreeSet::new());
    for action in actions {
        let TransactionAction::BlockSnapshotAdd(BlockSnapshot { node, name }) = action else { continue };
        if !names.insert(name) {
            return Err(generic(SnapshotError::Exists(name.clone())));
        }
        let disk = concerned.get(node.as_str()).ok_or_else(|| node_not_found(node))?;
        prepared.push((node.as_str(), snapshots::prepare(disks, disk, name)?));
    }
    Ok(prepared)
}

/// Writes the names of persistent bitmaps that are about to be added to the sidecars; returns the disks, which may have no place for them.
fn list_added<'a>(actions: &'a [TransactionAction], disks: &BTreeMap<&str, &Arc<Disk>>) -> Result<BTreeSet<&'a str>, QmpError> {
    let mut added: BTreeMap<&str, Vec<(&str, Granularity)>> = BTreeMap::new();
    for action in actions {
        let TransactionAction::BlockDirtyBitmapAdd(add) = action else { continue };
        if !add.persistent {
            continue;
        }
        // In QEMU's order: what is wrong with the bitmap comes first.
        let granularity = granularity(add)?;
        if add.name.is_empty() {
            return Err(generic(BitmapError::NoName));
        }
        if let Some(reason) = disks.get(add.node.as_str()).and_then(|disk| disk.refuses_persistent()) {
            return Err(cannot_persist(add, reason));
        }
        added.entry(&add.node).or_default().push((&add.name, granularity));
    }
    for (node, bitmaps) in &added {
        if let Some(disk) = disks.get(node) {
            disk.list_persistent(bitmaps).map_err(generic)?;
        }
    }
    Ok(added.into_keys().collect())
}

fn cannot_persist(add: &BlockDirtyBitmapAdd, reason: &str) -> QmpError {
    QmpError::generic(format!("Can't make bitmap '{}' persistent in '{}': {reason}", add.name, add.node))
}

fn granularity(add: &BlockDirtyBitmapAdd) -> Result<Granularity, QmpError> {
    add.granularity.map_or(Ok(Granularity::default()), |bytes| Granularity::new(bytes.into())).map_err(generic)
}

fn carry_out(
    actions: &[TransactionAction],
    disks: &BTreeMap<&str, &Arc<Disk>>,
    snapshots: Vec<(&str, PreparedSnapshot)>,
) -> Result<(), QmpError> {
    // In the order of the ids: see `DirtyBitmaps::hold`.
    let mut held: BTreeMap<&str, HeldBitmaps<'_>> = disks.iter().map(|(node, disk)| (*node, disk.bitmaps().hold())).collect();
    for action in actions {
        act(action, &mut held)?;
    }
    // From here on nothing fails.
    for (node, snapshot) in snapshots {
        if let Some(bitmaps) = held.get(node) {
            snapshot.install(bitmaps);
        }
    }
    held.into_values().for_each(HeldBitmaps::commit);
    Ok(())
}

fn act(action: &TransactionAction, held: &mut BTreeMap<&str, HeldBitmaps<'_>>) -> Result<(), QmpError> {
    let mut of = |node: &str, operate: &mut dyn FnMut(&mut HeldBitmaps<'_>) -> Result<(), BitmapError>| {
        held.get_mut(node).ok_or_else(|| node_not_found(node)).and_then(|bitmaps| operate(bitmaps).map_err(generic))
    };
    match action {
        TransactionAction::BlockDirtyBitmapAdd(add) => {
            let granularity = granularity(add)?;
            of(&add.node, &mut |bitmaps| bitmaps.add(&add.name, granularity, !add.disabled, add.persistent))
        }
        TransactionAction::BlockDirtyBitmapRemove(BlockDirtyBitmap { node, name }) => of(node, &mut |bitmaps| bitmaps.remove(name)),
        TransactionAction::BlockDirtyBitmapClear(BlockDirtyBitmap { node, name }) => of(node, &mut |bitmaps| bitmaps.clear(name)),
        TransactionAction::BlockDirtyBitmapEnable(BlockDirtyBitmap { node, name }) => {
            of(node, &mut |bitmaps| bitmaps.set_enabled(name, true))
        }
        TransactionAction::BlockDirtyBitmapDisable(BlockDirtyBitmap { node, name }) => {
            of(node, &mut |bitmaps| bitmaps.set_enabled(name, false))
        }
        TransactionAction::BlockDirtyBitmapMerge(merge) => {
            let mut sources = Vec::new();
            of(&merge.node, &mut |bitmaps| bitmaps.source(&merge.target).map(drop))?;
            for source in &merge.bitmaps {
                let (node, name) = match source {
                    BlockDirtyBitmapMergeSource::Local(name) => (&merge.node, name),
                    BlockDirtyBitmapMergeSource::External(bitmap) => (&bitmap.node, &bitmap.name),
                };
                of(node, &mut |bitmaps| bitmaps.source(name).map(|source| sources.push(source)))?;
            }
            of(&merge.node, &mut |bitmaps| bitmaps.merge(&merge.target, &sources))
        }
        // Prepared before, and installed when all else is done.
        TransactionAction::BlockSnapshotAdd(_) => Ok(()),
        TransactionAction::Abort {} => Err(QmpError::generic("Transaction aborted using Abort action")),
    }
}

fn block_device_info(disk: &Disk) -> BlockDeviceInfo {
    let bitmaps = disk.bitmaps().info();
    let bitmaps: Vec<_> = bitmaps
        .into_iter()
        .map(|bitmap| BlockDirtyInfo {
            name: bitmap.name,
            count: bitmap.count,
            granularity: bitmap.granularity.bytes(),
            recording: bitmap.recording,
            busy: bitmap.busy,
            persistent: bitmap.persistent,
            inconsistent: bitmap.inconsistent,
        })
        .collect();
    BlockDeviceInfo::new(disk.config(), disk.size(), &bitmaps)
}

#[cfg(test)]
mod tests;
