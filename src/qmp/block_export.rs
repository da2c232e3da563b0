//! Arguments of the commands about NBD exports (QEMU's qapi/block-export.json).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::block::nbd::catalogue::RemoveMode;

/// Arguments of `nbd-server-start`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NbdServerStart {
    /// Where to listen.
    pub addr: SocketAddress,
    /// Clients at a time; 0 is no limit but Ferry's own. With 1, clients are told not to open a second connection.
    #[serde(default)]
    pub max_connections: u32,
}

/// QEMU's `SocketAddressLegacy`, as far as Ferry has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case", deny_unknown_fields)]
pub enum SocketAddress {
    /// A unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
    },
    /// A TCP port.
    Inet {
        /// Name or address.
        host: String,
        /// Port, as a string of digits.
        port: String,
    },
}

/// Arguments of `block-export-add`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BlockExportAdd {
    /// `nbd`.
    #[serde(rename = "type")]
    pub kind: BlockExportType,
    /// Its name for QMP.
    pub id: String,
    /// Disk to export.
    pub node_name: String,
    /// Its name for clients; the disk's by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it is, for people; at most 4096 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Whether clients may write.
    #[serde(default)]
    pub writable: bool,
    /// Dirty bitmaps to show as `qemu:dirty-bitmap:NAME`, as they are now.
    #[serde(default)]
    pub bitmaps: Vec<ExportedBitmap>,
}

/// The only type of export that Ferry has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockExportType {
    /// Over NBD.
    Nbd,
}

/// A dirty bitmap to export.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ExportedBitmap {
    /// Of the exported disk.
    Name(String),
    /// Of any disk of the same size.
    OfNode {
        /// Id of the disk.
        node: String,
        /// Name of the bitmap.
        name: String,
    },
}

/// Arguments of `block-export-del`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockExportDel {
    /// The export's name for QMP.
    pub id: String,
    /// Whether to disconnect its clients.
    #[serde(default)]
    pub mode: RemoveMode,
}
