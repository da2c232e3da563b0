//! Snapshots of the guest's disks, as QMP asks for them. Adding one is an action of [`super::disks`].

use std::sync::Arc;

use super::monitor::generic;
use crate::block::disk::Disk;
use crate::block::snapshot::{PreparedSnapshot, Snapshot, SnapshotError};
use crate::qmp::QmpError;
use crate::qmp::command::BlockSnapshot;

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
    }
    PreparedSnapshot::new(disk, name).map_err(generic)
}

/// The snapshot of any disk that has this name.
pub fn find(disks: &[Arc<Disk>], name: &str) -> Option<Snapshot> {
    disks.iter().find_map(|disk| Snapshot::find(disk, name))
}
