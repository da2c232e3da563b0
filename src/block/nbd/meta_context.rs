//! Metadata contexts: what `NBD_CMD_BLOCK_STATUS` tells of an export beside its content.

use std::io;
use std::sync::Arc;

use super::export::Export;
use super::protocol::state;
use crate::block::dirty_bitmap::BitmapCopy;
use crate::block::export_source::{ExportSource, ExtentKind};

/// Most extents in an answer, so that its size and the time it takes are bounded; a client asks on from where they end.
const MAX_EXTENTS: usize = 1 << 14;
const ALLOCATION: &str = "base:allocation";
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// A metadata context of an export.
#[derive(Clone, Debug)]
pub enum MetaContext {
    /// `base:allocation`.
    Allocation,
    /// `qemu:dirty-bitmap:NAME`.
    DirtyBitmap {
        /// The bitmap's name.
        name: String,
        /// Its content.
        dirty: Arc<BitmapCopy>,
    },
}

/// What a client wants with its queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryPurpose {
    /// To see what there is: a query can stand for a group.
    List,
    /// To use contexts, which are named in full.
    Set,
}

impl MetaContext {
    /// All that an export has.
    pub fn all(export: &Export) -> Vec<MetaContext> {
        let bitmap = |(name, dirty): &(String, Arc<BitmapCopy>)| MetaContext::DirtyBitmap { name: name.clone(), dirty: dirty.clone() };
        std::iter::once(MetaContext::Allocation).chain(export.bitmaps.iter().map(bitmap)).collect()
    }

    /// Its name on the wire.
    pub fn name(&self) -> String {
        match self {
            MetaContext::Allocation => ALLOCATION.to_owned(),
            MetaContext::DirtyBitmap { name, .. } => format!("{DIRTY_BITMAP}{name}"),
        }
    }

    /// Whether `query` means this one. When listing, a name space (`base:`, `qemu:`) or `qemu:dirty-bitmap:` stands for all in it.
    pub fn matches(&self, query: &str, purpose: QueryPurpose) -> bool {
        let group = match self {
            MetaContext::Allocation => query == "base:",
            MetaContext::DirtyBitmap { .. } => query == "qemu:" || query == DIRTY_BITMAP,
        };
        purpose == QueryPurpose::List && group || self.name() == query
    }

    /// The extents of a range that lies within the export and is not empty: lengths and flags, at most `limit` of them and at least one.
    pub fn extents(&self, source: &dyn ExportSource, offset: u64, length: u32, limit: usize) -> io::Result<Vec<(u32, u32)>> {
        let end = offset + u64::from(length);
        let mut extents: Vec<(u32, u32)> = Vec::new();
        let mut at = offset;
        while at < end {
            let (extent, flags) = self.first_extent(source, at, end)?;
            // No longer than the range, whose length has 32 bits.
            let extent = extent.clamp(1, end - at) as u32;
            at += u64::from(extent);
            let full = extents.len() == limit.min(MAX_EXTENTS);
            match extents.last_mut() {
                Some((last, same)) if *same == flags => *last += extent,
                _ if full => break,
                _ => extents.push((extent, flags)),
            }
        }
        Ok(extents)
    }

    fn first_extent(&self, source: &dyn ExportSource, at: u64, end: u64) -> io::Result<(u64, u32)> {
        match self {
            MetaContext::Allocation => {
                let extent = source.allocation(at, end - at)?;
                let flags = match extent.kind {
                    ExtentKind::Data => 0,
                    ExtentKind::Zero => state::ZERO,
                    ExtentKind::Hole => state::HOLE | state::ZERO,
                };
                Ok((extent.length, flags))
            }
            MetaContext::DirtyBitmap { dirty, .. } => {
                let (length, dirty) = dirty.extent(at, end);
                Ok((length, if dirty { state::DIRTY } else { 0 }))
            }
        }
    }
}
