//! What a guest is made of. It rides in the migration stream, so that `ferry receive` needs no copy of the command line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::memory::GuestRam;
use crate::memory::ram::RamError;

/// A guest's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// The guest's name, for people (`--name`).
    pub name: String,
    /// Number of vCPUs.
    pub cpus: u16,
    /// RAM in bytes, a multiple of [`crate::memory::ram::GRANULE`].
    pub memory: u64,
    /// Whether all of RAM is held in the host's memory, never swapped (`--memory SIZE,lock=on`); not while pages of it are still to come.
    pub lock_memory: bool,
    /// Whether RAM is made of hugetlb pages of 2 MiB (`--memory SIZE,hugepages=2M`), at a destination, too.
    pub hugepages: bool,
    /// bzImage or ELF, as a path on the host that booted the guest.
    pub kernel: PathBuf,
    /// Initial RAM disk, if any.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Disks in slot order.
    pub disks: Vec<DiskConfig>,
}

impl GuestConfig {
    /// The guest's RAM, zeroed.
    pub fn allocate_ram(&self) -> Result<GuestRam, RamError> {
        if self.hugepages { GuestRam::allocate_hugetlb(self.memory) } else { GuestRam::allocate(self.memory) }
    }
}

/// One virtio-blk disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Name of the disk on the command line, in QMP and in the stream; the guest reads it by GET_ID.
    pub id: String,
    /// Raw image or block device. The destination may map the id to another path.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// How it is used. Encoded apart from the rest, which is older.
    #[serde(skip)]
    pub options: DiskOptions,
}

/// How a disk's image is used (`--disk ...,cache=,discard=,werror=,rerror=`), with QEMU's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOptions {
    /// Through the host's page cache or past it.
    pub cache: CacheMode,
    /// What becomes of the guest's discards.
    pub discard: DiscardMode,
    /// What a failed write does.
    pub werror: WriteErrorAction,
    /// What a failed read does.
    pub rerror: ReadErrorAction,
}

/// `cache=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheMode {
    /// Through the host's page cache; durable when the guest flushes.
    #[default]
    Writeback,
    /// Past the host's page cache (`O_DIRECT`); durable when the guest flushes.
    None,
}

/// `discard=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiscardMode {
    /// The image's space is freed.
    #[default]
    Unmap,
    /// They succeed and do nothing.
    Ignore,
}

/// `werror=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WriteErrorAction {
    /// A full storage pauses the guest, any other error is the guest's.
    #[default]
    Enospc,
    /// The guest gets an I/O error.
    Report,
    /// The guest is paused.
    Stop,
}

/// `rerror=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReadErrorAction {
    /// The guest gets an I/O error.
    #[default]
    Report,
    /// The guest is paused.
    Stop,
}

impl DiskConfig {
    /// Longest id in bytes: what GET_ID of virtio-blk has room for (virtio 1.2, 5.2.6).
    pub const MAX_ID: usize = 20;

    /// Whether `id` may name a disk: 1 to [`DiskConfig::MAX_ID`] ASCII letters, digits, `-`, `_` or `.`.
    pub fn is_id(id: &str) -> bool {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        (1..=Self::MAX_ID).contains(&id.len()) && id.bytes().all(allowed)
    }
}
