//! Which parts of an image take space.

use std::io;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::LockedImage;
use crate::block::SECTOR_SIZE;
use crate::block::export_source::{Extent, ExtentKind};

/// How often to look again where a file changes between two looks at it.
const LOOKS: usize = 3;

impl LockedImage {
    /// The first extent of the range, which must not be empty: whole sectors. On a file as the file system tells (lseek(2), `SEEK_DATA`), which
    /// never takes for a hole what was written before the call, on storage or not. A block device is all data.
    pub fn allocation(&self, offset: u64, length: u64) -> io::Result<Extent> {
        self.check_range(offset, length)?;
        let data = |length| Ok(Extent { length, kind: ExtentKind::Data });
        if self.image.block_device {
            return data(length);
        }
        for _ in 0..LOOKS {
            // Nobody uses the file's position, which this moves.
            let hole_end = match seek(&self.image.file, SeekFrom::Data(offset)) {
                Ok(next) => next.min(offset + length),
                // No data from here to the end.
                Err(Errno::NXIO) => offset + length,
                // A file system that cannot tell.
                Err(Errno::INVAL | Errno::OPNOTSUPP) => return data(length),
                Err(errno) => return Err(errno.into()),
            };
            // Only whole sectors of it; what begins within the first one makes that data.
            let hole = hole_end.saturating_sub(offset) / SECTOR_SIZE * SECTOR_SIZE;
            if hole > 0 {
                return Ok(Extent { length: hole, kind: ExtentKind::Hole });
            }
            let data_end = seek(&self.image.file, SeekFrom::Hole(hole_end))?;
            if data_end > offset {
                return data((data_end - offset).next_multiple_of(SECTOR_SIZE).min(length));
            }
            // It was deallocated in between.
        }
        data(length)
    }
}
