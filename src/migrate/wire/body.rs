//! What the larger frames carry.

use serde::{Deserialize, Serialize};

use crate::memory::{HostPage, PageRun};

/// What the destination must be ready for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Size of the guest's RAM in pages.
    pub ram_pages: u64,
    /// What RAM is made of, at both sides. Of a missing host page nothing is there, and all of it comes at once.
    pub host_page: HostPage,
    /// Where RAM is mapped by transparent huge pages at the source: whole huge pages, ascending, at most
    /// [`MAX_RANGES`](crate::memory::thp::MAX_RANGES) runs.
    pub huge: Vec<PageRun>,
    /// Whether the destination must be able to do postcopy.
    pub postcopy: bool,
    /// Connections for pages: 1 to [`MAX_PAGE_CHANNELS`](super::MAX_PAGE_CHANNELS).
    pub page_channels: u8,
    /// The machine's configuration and needs.
    #[serde(with = "serde_bytes")]
    pub machine: Vec<u8>,
    /// How many blocks each disk of the guest has whose contents come along, as [`Layout::new`](crate::migrate::layout::Layout::new) takes them:
    /// 0 where the destination has the disk. Empty before version 3.
    #[serde(skip)]
    pub disks: Vec<u64>,
}

/// Pages sent since the beginning, for the destination to compare with what it received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Pages sent with contents.
    pub normal: u64,
    /// Pages named as zero.
    pub zero: u64,
}

/// A dirty bitmap of a disk that moves with the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapInfo {
    /// The disk's id.
    pub disk: String,
    /// The bitmap's name.
    pub name: String,
    /// Bytes of disk per bit.
    pub granularity: u32,
    /// Number of bits.
    pub bits: u64,
    /// Whether it records writes, and whether it is to outlive the guest.
    #[serde(with = "flags")]
    pub flags: BitmapFlags,
}

/// What a dirty bitmap is like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BitmapFlags {
    /// It records writes.
    pub enabled: bool,
    /// It outlives the guest. Not known in version 1.
    pub persistent: bool,
}

/// Flags as a byte, whose first bit was all there was of it in version 1.
mod flags {
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    use super::BitmapFlags;

    pub fn serialize<S: Serializer>(flags: &BitmapFlags, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(u8::from(flags.enabled) | u8::from(flags.persistent) << 1)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BitmapFlags, D::Error> {
        match u8::deserialize(deserializer)? {
            byte @ 0..4 => Ok(BitmapFlags { enabled: byte & 1 != 0, persistent: byte & 2 != 0 }),
            _ => Err(D::Error::custom("unknown flags of a bitmap")),
        }
    }
}

impl BitmapInfo {
    /// Number of 64-bit words its bits take.
    pub const fn words(&self) -> u64 {
        self.bits.div_ceil(64)
    }
}

/// Everything the destination needs to become able to run the guest: read whole before any of it is loaded, because loading it can
/// fault on guest RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// Pages sent before the package.
    pub sent: Totals,
    /// Whether `missing` pages come after the commit. Without it nothing may be missing.
    pub postcopy: bool,
    /// Runs of pages that the destination does not hold yet or holds in an old version, ascending, in whole host pages.
    pub missing: Vec<PageRun>,
    /// Dirty bitmaps whose bits follow after the commit.
    pub bitmaps: Vec<BitmapInfo>,
    /// Devices, vCPUs and VM, encoded by the machine.
    #[serde(with = "serde_bytes")]
    pub machine: Vec<u8>,
}

/// How far the dirty bitmaps have come: everything before this place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapPlace {
    /// Index of the first bitmap in [`Package::bitmaps`] that is not complete; their number if all are.
    pub index: u32,
    /// Words of it that have come.
    pub words: u64,
}

/// What a destination has when its source comes back on a new connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// Whether the commit has come. If not, the source says it again, or that it never gave the guest up.
    pub committed: bool,
    /// Pages that have not come, ascending, in whole host pages.
    pub missing: Vec<PageRun>,
    /// How far the bitmaps have come.
    pub bitmaps: BitmapPlace,
}
