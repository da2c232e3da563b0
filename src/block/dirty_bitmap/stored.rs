//! Bitmaps that outlive the process: to a sidecar and back.

use std::borrow::Cow;
use std::sync::Arc;

use super::bits::{Bits, PIECE_WORDS};
use super::{BitmapError, DirtyBitmap, DirtyBitmaps, Granularity, Role};
use crate::block::sidecar::{Piece, StoredBitmap};

impl DirtyBitmaps {
    /// Whether there are persistent bitmaps.
    pub fn has_persistent(&self) -> bool {
        self.read().bitmaps.iter().any(|bitmap| bitmap.persistent)
    }

    /// The persistent bitmaps by name only: what a sidecar says while they are in use, and a reader takes as inconsistent.
    pub fn listed(&self) -> Vec<StoredBitmap<'static>> {
        self.read()
            .bitmaps
            .iter()
            .filter(|bitmap| bitmap.persistent)
            .map(|bitmap| StoredBitmap::listed(&bitmap.name, granularity(bitmap)))
            .collect()
    }

    /// The persistent bitmaps with all that they recorded, once nothing changes the disk any more. One whose bits have not all come with a
    /// migration is left out.
    pub fn stored(&self) -> Vec<StoredBitmap<'static>> {
        let recorders = self.read();
        let whole = recorders.bitmaps.iter().filter(|bitmap| bitmap.persistent && !matches!(bitmap.role, Role::Incoming { .. }));
        let store = |bitmap: &DirtyBitmap| {
            let mut stored = StoredBitmap::listed(&bitmap.name, granularity(bitmap));
            if !bitmap.inconsistent {
                stored.enabled = bitmap.enabled;
                let pieces = (0u64..).zip(bitmap.bits.pieces()).filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0));
                stored.pieces = Some(pieces.map(|(index, bytes)| Piece { index, bytes: Cow::Owned(bytes) }).collect());
            }
            stored
        };
        whole.map(store).collect()
    }

    /// Takes back a bitmap that was stored. Without its bits, or with bits that are not of this disk, it is inconsistent.
    pub fn restore(&self, stored: &StoredBitmap<'_>) -> Result<(), BitmapError> {
        let granularity = Granularity::new(stored.granularity.into())?;
        let make = |bits: Bits| {
            let pieces = stored.pieces.as_deref();
            let consistent = pieces.is_some_and(|pieces| pieces.iter().all(|piece| load(&bits, piece)));
            // Nobody is to see a part of what was recorded.
            let bits = if consistent { bits } else { Bits::new(self.disk_size, granularity) };
            DirtyBitmap {
                name: stored.name.to_string(),
                bits: Arc::new(bits),
                enabled: consistent && stored.enabled,
                persistent: true,
                inconsistent: !consistent,
                role: Role::Idle,
            }
        };
        self.change(|held| held.insert(&stored.name, granularity, make))
    }
}

fn granularity(bitmap: &DirtyBitmap) -> u32 {
    bitmap.bits.granularity().0
}

/// False if the piece is not one of these bits.
fn load(bits: &Bits, piece: &Piece<'_>) -> bool {
    let Some(first) = piece.index.checked_mul(PIECE_WORDS as u64).filter(|first| *first < bits.words()) else { return false };
    if piece.bytes.len() as u64 != (bits.words() - first).min(PIECE_WORDS as u64) * 8 {
        return false;
    }
    for (index, word) in (first..).zip(piece.bytes.as_chunks().0) {
        bits.or_word(index, u64::from_le_bytes(*word));
    }
    true
}
