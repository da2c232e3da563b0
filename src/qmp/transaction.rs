//! What is done to dirty bitmaps, alone or together with others in a transaction (QEMU's qapi/block-core.json and qapi/transaction.json).

use serde::{Deserialize, Serialize};

/// Arguments of `block-dirty-bitmap-add`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockDirtyBitmapAdd {
    /// Id of the disk.
    pub node: String,
    /// Name of the bitmap, unique to the disk.
    pub name: String,
    /// Bytes of disk to a bit, a power of two of at least 512. QEMU's default is 64 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granularity: Option<u32>,
    /// Whether it is to outlive Ferry.
    #[serde(default)]
    pub persistent: bool,
    /// Whether it starts out ignoring writes.
    #[serde(default)]
    pub disabled: bool,
}

/// A disk's dirty bitmap by name: arguments of most other `block-dirty-bitmap-` commands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockDirtyBitmap {
    /// Id of the disk.
    pub node: String,
    /// Name of the bitmap.
    pub name: String,
}

/// Arguments of `block-dirty-bitmap-merge`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockDirtyBitmapMerge {
    /// Id of the target's disk.
    pub node: String,
    /// Name of the bitmap that takes in what the others have.
    pub target: String,
    /// The others.
    pub bitmaps: Vec<BlockDirtyBitmapMergeSource>,
}

/// A bitmap to merge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BlockDirtyBitmapMergeSource {
    /// Name of a bitmap of the target's disk.
    Local(String),
    /// A bitmap of any disk of the same size.
    External(BlockDirtyBitmap),
}

/// A disk's snapshot by name: arguments of the `block-snapshot-` commands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockSnapshot {
    /// Id of the disk.
    pub node: String,
    /// Name of the snapshot, unique among all disks and snapshots.
    pub name: String,
}

/// Arguments of `transaction`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transaction {
    /// What is done, in this order, at one moment for the guest's writes: all of it or, if one fails, nothing.
    pub actions: Vec<TransactionAction>,
    /// How.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<TransactionProperties>,
}

/// QEMU's `TransactionProperties`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TransactionProperties {
    /// The only one for actions that begin no job.
    pub completion_mode: CompletionMode,
}

/// QEMU's `ActionCompletionMode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompletionMode {
    /// No action waits for another.
    Individual,
}

/// One action of a transaction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case", deny_unknown_fields)]
pub enum TransactionAction {
    /// As the command of this name.
    BlockDirtyBitmapAdd(BlockDirtyBitmapAdd),
    /// As the command of this name.
    BlockDirtyBitmapRemove(BlockDirtyBitmap),
    /// As the command of this name.
    BlockDirtyBitmapClear(BlockDirtyBitmap),
    /// As the command of this name.
    BlockDirtyBitmapEnable(BlockDirtyBitmap),
    /// As the command of this name.
    BlockDirtyBitmapDisable(BlockDirtyBitmap),
    /// As the command of this name.
    BlockDirtyBitmapMerge(BlockDirtyBitmapMerge),
    /// As the command of this name.
    BlockSnapshotAdd(BlockSnapshot),
    /// Fails, for tests.
    Abort {},
}

impl TransactionAction {
    /// The disks that it concerns, by id.
    pub fn nodes(&self) -> Vec<&str> {
        match self {
            TransactionAction::BlockDirtyBitmapAdd(add) => vec![&add.node],
            TransactionAction::BlockDirtyBitmapRemove(bitmap)
            | TransactionAction::BlockDirtyBitmapClear(bitmap)
            | TransactionAction::BlockDirtyBitmapEnable(bitmap)
            | TransactionAction::BlockDirtyBitmapDisable(bitmap) => vec![&bitmap.node],
            TransactionAction::BlockDirtyBitmapMerge(merge) => {
                let others = merge.bitmaps.iter().filter_map(|source| match source {
                    BlockDirtyBitmapMergeSource::Local(_) => None,
                    BlockDirtyBitmapMergeSource::External(bitmap) => Some(bitmap.node.as_str()),
                });
                std::iter::once(merge.node.as_str()).chain(others).collect()
            }
            TransactionAction::BlockSnapshotAdd(snapshot) => vec![&snapshot.node],
            TransactionAction::Abort {} => Vec::new(),
        }
    }
}
