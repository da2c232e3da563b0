//! Whether I/O on an image goes through the host's page cache, by copying, or may reach guest memory by its physical address.

use std::path::Path;

use crate::vm::config::CacheMode;

/// `f_type` of file systems (statfs(2)) that read and write files through the page cache unless `O_DIRECT` is set: ext4 and its kin, XFS, Btrfs,
/// tmpfs (and so the device files of disks), NFS. Others may do without, as FUSE, 9p and SMB can be told to.
const CACHED: [u64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x6969];

/// Whether nothing but the processor copies between guest memory and the image at `path`, which may be about to be created. False where
/// that cannot be told.
pub fn is_cached(path: &Path, cache: CacheMode) -> bool {
    let known = rustix::fs::statfs(path).or_else(|errno| path.parent().map_or(Err(errno), rustix::fs::statfs));
    cache == CacheMode::Writeback && known.is_ok_and(|known| CACHED.contains(&(known.f_type as u64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_file_systems_that_are_known_count() {
        assert!(is_cached(Path::new("/dev/null"), CacheMode::Writeback));
        assert!(!is_cached(Path::new("/dev/null"), CacheMode::None));
        assert!(!is_cached(Path::new("/proc/self/mem"), CacheMode::Writeback));
        assert!(is_cached(Path::new("/dev/no-such-device"), CacheMode::Writeback));
        assert!(!is_cached(Path::new("/proc/no/such/file"), CacheMode::Writeback));
    }
}
