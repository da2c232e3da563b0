//! System calls on images that rustix has no safe form of.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Writes out and drops the page cache of a block device: `_IO(0x12, 97)` of linux/fs.h.
const BLKFLSBUF: libc::c_ulong = 0x1261;
/// Discards `[offset, length]` of a block device: `_IO(0x12, 119)` of linux/fs.h.
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Sets the open file description's lock on the whole file to `kind`, one of `F_RDLCK`, `F_WRLCK` and `F_UNLCK`, without waiting.
pub(super) fn set_ofd_lock(file: &File, kind: libc::c_int) -> io::Result<()> {
    // A length of 0 reaches to the end however far that moves; `l_pid` must be 0 for this kind of lock (fcntl(2)).
    let lock = libc::flock { l_type: kind as libc::c_short, l_whence: libc::SEEK_SET as libc::c_short, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the kernel only reads `lock`, which outlives the call.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) })
}

/// Writes out and drops the cached buffers of a block device.
pub(super) fn flush_buffers(device: &File) -> io::Result<()> {
    // SAFETY: this request takes no pointer.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKFLSBUF, 0) })
}

/// Discards a range of a block device, in bytes.
pub(super) fn discard(device: &File, offset: u64, length: u64) -> io::Result<()> {
    let range = [offset, length];
    // SAFETY: the kernel reads two 64-bit words, which outlive the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) })
}

/// Starts to write out what is cached of a range, in bytes (sync_file_range(2)). An error is left for the flush, which reports it.
pub(super) fn start_write_back(file: &File, range: Range<u64>) {
    let (offset, length) = (range.start as libc::off64_t, range.end.saturating_sub(range.start) as libc::off64_t);
    // SAFETY: this call takes no pointer.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE) };
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
