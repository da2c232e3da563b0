//! Snapshots of the guest's disks, as QMP asks for them. Adding one is an action of [`super::disks`].

use std::sync::Arc;

use crate::block::disk::Disk;
use crate::block::snapshot::{PreparedSnapshot, Snapshot, SnapshotError};
use crate::qmp::QmpError;
use crate::qmp::command::BlockSnapshot;

fn generic(error: impl std::fmt::Display) -> QmpError {
    QmpError::generic(error.to_string())
}

<<<<<<< HEAD
/// `block-snapshot-remove`.
pub fn remove(disks: &[Arc<Disk>], BlockSnapshot { node, name }: &BlockSnapshot) -> Result<(), QmpError> {
    let disk = disks.iter().find(|disk| disk.config().id == *node).ok_or_else(|| QmpError::device_not_found(node))?;
    match disk.snapshots().remove(name) {
        true => Ok(()),
        false => Err(generic(SnapshotError::NotFound { disk: node.clone(), name: name.clone() })),
    }
}

/// Makes a snapshot of `disk` ready, whose name must be no other node's: disks and snapshots have one name space.
pub fn prepare(disks: &[Arc<Disk>], disk: &Arc<Disk>, name: &str) -> Result<PreparedSnapshot, QmpError> {
    if disks.iter().any(|disk| disk.config().id == name) || find(disks, name).is_some() {
        return Err(generic(SnapshotError::Exists(name.to_owned())));
=======
fn disk<'a>(disks: &'a [Arc<Disk>], id: &str) -> Result<&'a Arc<Disk>, QmpError> {
    disks.iter().find(|disk| disk.config().id == id).ok_or_else(|| QmpError::device_not_found(id))
}

/// Who adds snapshots for QMP: one at a time, so that no two have the same name.
#[derive(Debug, Default)]
pub(super) struct Snapshots(Mutex<()>);

impl Snapshots {
    /// `block-snapshot-add`: between two changes of the disk.
    pub fn add(&self, disks: &[Arc<Disk>], snapshot: &BlockSnapshot) -> Result<(), QmpError> {
        let _alone = lock(&self.0);
        for prepared in prepare(disks, [snapshot])? {
            let disk = prepared.disk().clone();
            prepared.install(&disk.bitmaps().hold());
        }
        Ok(())
    }

    /// `block-snapshot-remove`.
    pub fn remove(&self, disks: &[Arc<Disk>], BlockSnapshot { node, name }: &BlockSnapshot) -> Result<(), QmpError> {
        let disk = disk(disks, node)?;
        match disk.snapshots().remove(name) {
            true => Ok(()),
            false => Err(generic(SnapshotError::NotFound { disk: node.clone(), name: name.clone() })),
        }
    }
}

/// Makes snapshots ready, to be installed at one moment. Their names must be no other node's: disks and snapshots have one name space.
pub(super) fn prepare<'a>(
    disks: &[Arc<Disk>],
    asked: impl IntoIterator<Item = &'a BlockSnapshot>,
) -> Result<Vec<PreparedSnapshot>, QmpError> {
    let mut prepared: Vec<PreparedSnapshot> = Vec::new();
    for BlockSnapshot { node, name } in asked {
        let disk = disk(disks, node)?;
        let taken = disks.iter().any(|disk| disk.config().id == *name) || find(disks, name).is_some();
        if taken || prepared.iter().any(|other| other.name() == name) {
            return Err(generic(SnapshotError::Exists(name.clone())));
        }
        prepared.push(PreparedSnapshot::new(disk, name).map_err(generic)?);
>>>>>>> snapshot
    }
    Ok(prepared)
}

/// The snapshot of any disk that has this name.
pub fn find(disks: &[Arc<Disk>], name: &str) -> Option<Snapshot> {
    disks.iter().find_map(|disk| Snapshot::find(disk, name))
}
