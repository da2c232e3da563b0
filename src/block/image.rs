//! Raw images: files and block devices, who may use them, and I/O on them.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, FallocateFlags};
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::SECTOR_SIZE;
use super::sidecar::ImageStamp;
use crate::vm::config::CacheMode;

mod allocation;
mod cached;
mod direct;
mod incoming;
mod ioctl;
mod vectored;

pub use cached::is_cached;
use direct::Direct;
pub use incoming::{IncomingError, IncomingFile};

/// Why an image cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The image cannot be opened.
    #[error("cannot open disk image {path}: {source}")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The path names a directory, a pipe or the like.
    #[error("disk image {path} is neither a regular file nor a block device")]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// The size is zero or not a whole number of sectors.
    #[error(
        "disk image {path} has {size} bytes, which is not a whole number (1 or more) of 512-byte sectors; resize it, for example with truncate"
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// `cache=none` is not possible.
    #[error("disk image {path} is on a file system without direct I/O, which cache=none needs; use cache=writeback")]
    NoDirectIo {
        /// The image.
        path: PathBuf,
    },
    /// Direct I/O moves whole blocks.
    #[error(
        "disk image {path} has {size} bytes, which is not a whole number of blocks of {block} bytes, as cache=none needs here; resize it, or \
         use cache=writeback"
    )]
    DirectSize {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Bytes in a block.
        block: u64,
    },
    /// Another open of the image, in this process or another, holds a lock that excludes ours.
    #[error("disk image {path} is in use by another runner{}; stop that one first", if *.readonly { ", which may write to it" } else { "" })]
    InUse {
        /// The image.
        path: PathBuf,
        /// Whether we wanted only to read.
        readonly: bool,
    },
    /// The kernel refused something else.
    #[error("cannot {action} disk image {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An open image that nobody may do I/O on: its lock is not held. The destination of a migration opens and measures images in this state while
/// the source still writes to them.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    readonly: bool,
    block_device: bool,
    size: u64,
    block_size: u32,
    direct: Option<Box<Direct>>,
    /// The error of a flush that failed.
    flush_failed: AtomicBool,
}

/// Taking the lock failed; the image is given back.
#[derive(Debug, Error)]
#[error("{error}")]
pub struct LockError {
    /// The image, still unlocked.
    pub image: Image,
    /// What was in the way.
    #[source]
    pub error: ImageError,
}

impl Image {
    /// Opens the file or block device at `path` and measures it. Takes no lock.
    pub fn open(path: &Path, readonly: bool, cache: CacheMode) -> Result<Self, ImageError> {
        let path = path.to_owned();
        // Before the open: opening some devices does something, and the path may come from another host.
        let metadata = std::fs::metadata(&path).map_err(|source| ImageError::Open { path: path.clone(), source })?;
        if !is_image(metadata.file_type()) {
            return Err(ImageError::Kind { path });
        }
        // O_NONBLOCK has no effect on files and disks; it keeps a path that names a pipe from blocking us before it is refused.
        let direct = if cache == CacheMode::None { libc::O_DIRECT } else { 0 };
        let options = OpenOptions::new().read(true).write(!readonly).custom_flags(libc::O_NONBLOCK | direct).open(&path);
        let file = options.map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) if cache == CacheMode::None => ImageError::NoDirectIo { path: path.clone() },
            _ => ImageError::Open { path: path.clone(), source },
        })?;
        Self::of(file, path, readonly, cache)
    }

    /// Measures an open file, which is open for direct I/O if `cache` is none.
    fn of(mut file: File, path: PathBuf, readonly: bool, cache: CacheMode) -> Result<Self, ImageError> {
        let io_error = |action, source| ImageError::Io { action, path: path.clone(), source };
        let kind = file.metadata().map_err(|source| io_error("examine", source))?.file_type();
        let block_device = kind.is_block_device();
        if !is_image(kind) {
            return Err(ImageError::Kind { path });
        }
        let size = file.seek(SeekFrom::End(0)).map_err(|source| io_error("measure", source))?;
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(ImageError::Size { path, size });
        }
        let block_size = match block_device {
            true => rustix::fs::ioctl_blksszget(&file).map_err(|errno| io_error("measure the blocks of", errno.into()))?,
            false => SECTOR_SIZE as u32,
        };
        let direct = match cache {
            CacheMode::Writeback => None,
            CacheMode::None => match Direct::of(&file).map_err(|source| io_error("examine", source))? {
                None => return Err(ImageError::NoDirectIo { path }),
                Some(direct) if !size.is_multiple_of(direct.block()) => {
                    return Err(ImageError::DirectSize { path, size, block: direct.block() });
                }
                some => some.map(Box::new),
            },
        };
        Ok(Image { file, path, readonly, block_device, size, block_size, direct, flush_failed: AtomicBool::new(false) })
    }

    /// Takes the image's open file description lock (`F_OFD_SETLK`, fcntl(2)): a shared one for a reader, an exclusive one for a writer.
    /// It excludes other processes and other opens in this one.
    pub fn lock(self) -> Result<LockedImage, LockError> {
        let kind = if self.readonly { libc::F_RDLCK } else { libc::F_WRLCK };
        match ioctl::set_ofd_lock(&self.file, kind) {
            Ok(()) => Ok(LockedImage { image: self }),
            Err(source) => {
                let path = self.path.clone();
                let error = match source.raw_os_error() {
                    Some(libc::EAGAIN | libc::EACCES) => ImageError::InUse { path, readonly: self.readonly },
                    _ => ImageError::Io { action: "lock", path, source },
                };
                Err(LockError { image: self, error })
            }
        }
    }

    /// Where the image was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was opened for reading only.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Whether it is a block device rather than a file.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Size in bytes, a positive multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Logical block size in bytes; 512 for a file.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }
}

/// An image whose lock we hold: the only thing that can read or write it.
///
/// All offsets and lengths are in bytes; a range that reaches beyond the image is an `InvalidInput` error.
#[derive(Debug)]
pub struct LockedImage {
    image: Image,
}

impl LockedImage {
    /// What the image is.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Gives the lock up. Flush first if another host is to see what was written.
    pub fn unlock(self) -> Result<Image, ImageError> {
        match ioctl::set_ofd_lock(&self.image.file, libc::F_UNLCK) {
            Ok(()) => Ok(self.image),
            Err(source) => Err(ImageError::Io { action: "unlock", path: self.image.path.clone(), source }),
        }
    }

    /// Drops what this host has cached of the image, so that what another host wrote to shared storage is read from there. To be called when
    /// the image is taken over, before the first read. Direct I/O reads no cache.
    pub fn invalidate_cache(&self) -> Result<(), ImageError> {
        let image = &self.image;
        if image.direct.is_some() {
            return Ok(());
        }
        if image.block_device {
            match ioctl::flush_buffers(&image.file) {
                // BLKFLSBUF is for the superuser; the advice below is all that others have.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => {}
                done => return done.map_err(|source| self.error("drop the cache of", source)),
            }
        }
        rustix::fs::fadvise(&image.file, 0, None, Advice::DontNeed).map_err(|errno| self.error("drop the cache of", errno.into()))
    }

    /// Reads into guest memory, without a copy where its alignment allows, and marks what was written there, after it was written. If the
    /// read fails, all that may have changed is marked.
    pub fn read_vectored_at<B: BitmapSlice>(&self, target: &[VolatileSlice<B>], offset: u64) -> io::Result<()> {
        let length = vectored::length(target)?;
        self.check_range(offset, length)?;
        match &self.image.direct {
            Some(direct) if !direct.suits(target, offset) => {
                let mut at = 0;
                direct.read(&self.image.file, offset, length, |bytes| {
                    vectored::scatter(target, at, bytes);
                    at += bytes.len();
                })
            }
            _ => vectored::read_exact_at(&self.image.file, target, offset),
        }
    }

    /// Writes from guest memory, without a copy where its alignment allows.
    pub fn write_vectored_at<B: BitmapSlice>(&self, source: &[VolatileSlice<B>], offset: u64) -> io::Result<()> {
        let length = vectored::length(source)?;
        self.check_range(offset, length)?;
        match &self.image.direct {
            Some(direct) if !direct.suits(source, offset) => {
                let mut at = 0;
                direct.write(&self.image.file, offset, length, |bytes| {
                    vectored::gather(source, at, bytes);
                    at += bytes.len();
                })
            }
            direct => {
                let _changing = direct.as_ref().map(|direct| direct.changing());
                vectored::write_all_at(&self.image.file, source, offset)
            }
        }
    }

    /// Reads exactly `target.len()` bytes.
    pub fn read_at(&self, target: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_vectored_at(&[VolatileSlice::from(target)], offset)
    }

    /// Writes all of `source`.
    pub fn write_at(&self, source: &[u8], offset: u64) -> io::Result<()> {
        self.check_range(offset, source.len() as u64)?;
        let Image { file, direct, .. } = &self.image;
        match direct {
            None => file.write_all_at(source, offset),
            Some(direct) => {
                let mut rest = source;
                direct.write(file, offset, source.len() as u64, |bytes| {
                    let (now, later) = rest.split_at(bytes.len().min(rest.len()));
                    bytes.copy_from_slice(now);
                    rest = later;
                })
            }
        }
    }

    /// Has what is cached of a range written to storage, without waiting: advice, by which a later flush is shorter.
    pub fn start_write_back(&self, range: Range<u64>) {
        if self.image.direct.is_none() {
            ioctl::start_write_back(&self.image.file, range);
        }
    }

    /// Size and time of the last change, by which a change by others is noticed later. Nothing where no such time exists, as for a block
    /// device. Everything that was written is durable before.
    pub fn stamp(&self) -> io::Result<Option<ImageStamp>> {
        if self.image.block_device {
            return Ok(None);
        }
        self.flush()?;
        self.image.file.sync_all()?;
        let metadata = self.image.file.metadata()?;
        Ok(Some(ImageStamp { size: metadata.len(), seconds: metadata.mtime(), nanoseconds: metadata.mtime_nsec() }))
    }

    /// Makes everything written so far durable (fdatasync(2)). Once it has failed it fails for as long as the image is open: the kernel may
    /// have dropped what it could not write, and says so only once.
    pub fn flush(&self) -> io::Result<()> {
        let Image { file, direct, flush_failed, .. } = &self.image;
        if flush_failed.load(Ordering::Relaxed) {
            // Also where the storage was full: room does not bring back what was dropped.
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        // Direct I/O reports a failed write when it is made.
        file.sync_data().inspect_err(|_| flush_failed.store(direct.is_none(), Ordering::Relaxed))
    }

    /// Tells the storage that the range is not needed; its content is undefined afterwards. Storage that cannot use the advice ignores it.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_range(offset, length)?;
        let _changing = self.image.direct.as_ref().map(|direct| direct.changing());
        let discarded = match self.image.block_device {
            true => ioctl::discard(&self.image.file, offset, length),
            false => self.fallocate(FallocateFlags::PUNCH_HOLE, offset, length).map_err(io::Error::from),
        };
        match discarded {
            Err(error) if is_unsupported(&error) => Ok(()),
            done => done,
        }
    }

    /// Makes the range read as zeros; with `unmap` it may be deallocated. The kernel does it for files and block devices alike (fallocate(2)),
    /// and where it cannot, zeros are written.
    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.check_range(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let first = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        for mode in [first, FallocateFlags::ZERO_RANGE] {
            let changing = self.image.direct.as_ref().map(|direct| direct.changing());
            let zeroed = self.fallocate(mode, offset, length).map_err(io::Error::from);
            drop(changing);
            match zeroed {
                Err(error) if is_unsupported(&error) => {}
                done => return done,
            }
        }
        self.write_zeroes_by_hand(offset, length)
    }

    fn write_zeroes_by_hand(&self, offset: u64, length: u64) -> io::Result<()> {
        static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
        let Image { file, direct, .. } = &self.image;
        if let Some(direct) = direct {
            return direct.write(file, offset, length, |bytes| bytes.fill(0));
        }
        let mut done = 0;
        while done < length {
            let count = (length - done).min(ZEROES.len() as u64);
            let chunk = ZEROES.get(..count as usize).unwrap_or(&ZEROES);
            file.write_all_at(chunk, offset + done)?;
            done += count;
        }
        Ok(())
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> Result<(), Errno> {
        if length == 0 {
            return Ok(());
        }
        loop {
            match rustix::fs::fallocate(&self.image.file, mode | FallocateFlags::KEEP_SIZE, offset, length) {
                Err(Errno::INTR) => {}
                done => return done,
            }
        }
    }

    fn check_range(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.image.size => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "the range reaches beyond the end of the image")),
        }
    }

    fn error(&self, action: &'static str, source: io::Error) -> ImageError {
        ImageError::Io { action, path: self.image.path.clone(), source }
    }
}

/// Whether this is what an image can be.
fn is_image(kind: std::fs::FileType) -> bool {
    kind.is_block_device() || kind.is_file()
}

/// Whether the kernel says that this file system or device has no such operation, or not for this alignment.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL))
}

#[cfg(test)]
mod tests;
