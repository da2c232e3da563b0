//! Exports of the guest's disks over NBD, as QMP asks for them.

use std::sync::Arc;

use serde_json::{Value, json};

use super::monitor::{answer, done, generic};
use super::{Vmm, lock, snapshots};
use crate::block::dirty_bitmap::{BitmapCopy, BitmapError};
use crate::block::disk::Disk;
use crate::block::export_source::ExportSource;
use crate::block::nbd::catalogue::ExportInfo;
use crate::block::nbd::export::Export;
use crate::block::nbd::server::ServerAddress;
use crate::qmp::QmpError;
use crate::qmp::block_export::{BlockExportAdd, BlockExportDel, ExportedBitmap, NbdServerStart, SocketAddress};

impl Vmm {
    pub(super) fn start_nbd_server(&self, arguments: NbdServerStart) -> Result<Value, QmpError> {
        let address = match arguments.addr {
            SocketAddress::Unix { path } => ServerAddress::Unix { path },
            SocketAddress::Inet { host, port } => {
                let number = port.parse().map_err(|_| QmpError::generic(format!("port '{port}' is not a number from 0 to 65535")))?;
                ServerAddress::Inet { host, port: number }
            }
        };
        // 0 is no limit in QEMU, and here the default one.
        let limit = usize::try_from(arguments.max_connections).ok().filter(|limit| *limit > 0);
        self.nbd.start(&address, limit).map_err(generic)?;
        done()
    }

    pub(super) fn stop_nbd_server(&self) -> Result<Value, QmpError> {
        self.nbd.stop().map_err(generic)?;
        done()
    }

    pub(super) fn add_export(&self, arguments: BlockExportAdd) -> Result<Value, QmpError> {
        let BlockExportAdd { kind: _, id, node_name: node, name, description, writable, bitmaps } = arguments;
        if !id.starts_with(|first: char| first.is_ascii_alphabetic())
            || !id.chars().all(|letter| letter.is_ascii_alphanumeric() || "-._".contains(letter))
        {
            return Err(QmpError::generic("Invalid block export id"));
        }
        let snapshot = snapshots::find(&lock(&self.disks), &node);
        let disk = match &snapshot {
            Some(snapshot) => snapshot.disk().clone(),
            None => self.disk(&node)?,
        };
        // Of a guest that is not here, or no longer, nothing can be exported.
        disk.check_available().map_err(generic)?;
        if writable && (disk.config().readonly || snapshot.is_some()) {
            return Err(QmpError::generic("Cannot export read-only node as writable"));
        }
        let bitmaps = bitmaps.iter().map(|bitmap| self.copy_bitmap(&disk, bitmap)).collect::<Result<_, _>>()?;
        let name = name.unwrap_or_else(|| node.clone());
        let source: Arc<dyn ExportSource> = match snapshot {
            Some(snapshot) => Arc::new(snapshot),
            None => disk.clone(),
        };
        let writable = writable.then_some(disk);
        self.nbd.add(Export { id, node, name, description, source, writable, bitmaps }).map_err(generic)?;
        done()
    }

    /// The bitmap's content now; the bitmap itself stays free for everything.
    fn copy_bitmap(&self, exported: &Arc<Disk>, bitmap: &ExportedBitmap) -> Result<(String, Arc<BitmapCopy>), QmpError> {
        let (disk, name) = match bitmap {
            ExportedBitmap::Name(name) => (exported.clone(), name),
            ExportedBitmap::OfNode { node, name } => (self.disk(node)?, name),
        };
        if disk.size() != exported.size() {
            return Err(QmpError::generic(format!("Bitmap '{name}' is of a disk of another size")));
        }
        match disk.bitmaps().copy(name) {
            Ok(copy) => Ok((name.clone(), Arc::new(copy))),
            // QEMU's words in this place.
            Err(BitmapError::NotFound(_)) => Err(QmpError::generic(format!("Bitmap '{name}' is not found"))),
            Err(error) => Err(generic(error)),
        }
    }

    pub(super) fn delete_export(&self, arguments: &BlockExportDel) -> Result<Value, QmpError> {
        self.nbd.remove(&arguments.id, arguments.mode).map_err(generic)?;
        done()
    }

    pub(super) fn query_exports(&self) -> Result<Value, QmpError> {
        let describe =
            |export: ExportInfo| json!({ "id": export.id, "type": "nbd", "node-name": export.node, "shutting-down": export.shutting_down });
        answer(&self.nbd.exports().into_iter().map(describe).collect::<Vec<_>>())
    }
}
