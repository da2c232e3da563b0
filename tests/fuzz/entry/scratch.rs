//! Files that need no disk.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// A file in memory with `content`; it is gone when the handle is.
pub fn file(content: &[u8]) -> (File, PathBuf) {
    let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    std::os::unix::fs::FileExt::write_all_at(&file, content, 0).expect("written");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}
