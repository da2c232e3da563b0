//! What clients can do with one exported disk.

use std::io;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::protocol::{MAX_STRING, transmission_flag as flag};
use crate::block::dirty_bitmap::BitmapCopy;
use crate::block::disk::Disk;
use crate::block::export_source::ExportSource;

/// What goes into one call to the kernel when ranges are zeroed or discarded, in bytes. Giving the disk up waits for such a call.
const RANGE_PIECE: u64 = 8 << 20;

/// A disk, or a frozen point in time of one, under a name for NBD's clients.
pub struct Export {
    /// Its name for QMP.
    pub id: String,
    /// The disk or snapshot, as QMP calls it.
    pub node: String,
    /// Its name for clients.
    pub name: String,
    /// What it is, for people.
    pub description: Option<String>,
    /// What is read.
    pub source: Arc<dyn ExportSource>,
    /// The same disk where clients may write to it.
    pub writable: Option<Arc<Disk>>,
    /// Dirty bitmaps by name, as they were when the export was added.
    pub bitmaps: Vec<(String, Arc<BitmapCopy>)>,
}

impl Export {
    /// The longest name or description, in bytes.
    pub const MAX_STRING: usize = MAX_STRING;

    /// Transmission flags for a client, with `structured` replies or not, beside whom `others` may connect.
    pub fn flags(&self, structured: bool, others: bool) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA;
        flags |= if self.writable.is_some() { flag::SEND_TRIM | flag::SEND_WRITE_ZEROES } else { flag::READ_ONLY };
        if structured {
            flags |= flag::SEND_DF;
        }
        // All connections go to the same file, and its flush is for all that was written to it.
        if others {
            flags |= flag::CAN_MULTI_CONN;
        }
        flags
    }

    /// Writes `data`, which is left as it is.
    pub fn write(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk()?.with_io(|io| io.write(&[VolatileSlice::from(data)], offset))
    }

    /// Makes what was written durable.
    pub fn flush(&self) -> io::Result<()> {
        self.writable.as_ref().map_or(Ok(()), |disk| disk.with_io(|io| io.flush()))
    }

    /// Discards a range, or makes it zeros.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let disk = self.disk()?;
        in_pieces(offset, length, |offset, length| disk.with_io(|io| io.discard(offset, length)))
    }

    /// Makes the range zeros; with `unmap` it may be deallocated.
    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let disk = self.disk()?;
        in_pieces(offset, length, |offset, length| disk.with_io(|io| io.write_zeroes(offset, length, unmap)))
    }

    fn disk(&self) -> io::Result<&Disk> {
        self.writable.as_deref().ok_or_else(|| io::Error::from_raw_os_error(libc::EPERM))
    }
}

fn in_pieces(offset: u64, length: u64, mut each: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
    let mut done = 0;
    while done < length {
        let piece = (length - done).min(RANGE_PIECE);
        each(offset + done, piece)?;
        done += piece;
    }
    Ok(())
}
