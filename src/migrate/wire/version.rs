//! The versions of the protocol, and what differs between them.

#[cfg(doc)]
use super::{BitmapFlags, Frame, Package, Setup};
use crate::block::dirty_bitmap::RunLimits;

/// The newest version of the protocol that this Ferry speaks. Raised when a frame changes its form or meaning; both sides then still speak
/// the last released version with a peer that knows no newer one (`tests/streams`). Devices' state has versions of its own.
///
/// Version 5: a guest that goes on in precopy can bring the pages that are left, if they are few (in [`Package::machine`]).
///
/// Version 4: a guest that goes on in postcopy can bring the pages that it touches first (in [`Package::machine`]).
///
/// Version 3: disks can be copied ([`Setup::disks`], and what [`Frame::Done`] tells of them).
///
/// Version 2: dirty bitmaps can be persistent ([`BitmapFlags::persistent`]), and a frame can say of very many words of one that none or all
/// of their bits are set ([`Frame::Bitmap`]).
pub const VERSION: u16 = 5;
/// The oldest version of the protocol that this Ferry speaks.
pub const OLDEST_VERSION: u16 = 1;
/// Words of a dirty bitmap in one frame, at most: 8 KiB.
pub const MAX_BITMAP_WORDS: u64 = 1024;
/// Most words of a dirty bitmap that are alike and named in one frame: 8 MiB, which are set in about a millisecond.
pub const MAX_ALIKE_BITMAP_WORDS: u64 = 1 << 20;
/// How much of a dirty bitmap goes in one frame in `version` of the protocol.
pub const fn run_limits(version: u16) -> RunLimits {
    match version {
        1 => RunLimits { zeroes: MAX_BITMAP_WORDS, ones: 0, words: MAX_BITMAP_WORDS },
        _ => RunLimits { zeroes: MAX_ALIKE_BITMAP_WORDS, ones: MAX_ALIKE_BITMAP_WORDS, words: MAX_BITMAP_WORDS },
    }
}
