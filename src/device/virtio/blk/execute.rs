//! Doing what a request asks for.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP as UNMAP,
};
use vm_memory::Bytes;

use super::super::DriverError;
use super::config::{MAX_DISCARD_SECTORS, MAX_ZEROES_SECTORS};
use super::request::{GuestSlice, Operation, Request, SectorRange, Status};
use crate::block::SECTOR_SIZE;
use crate::block::disk::{Disk, DiskIo};
use crate::memory::ram::GuestMemory;

/// A range of the disk in bytes, within the disk.
struct ByteRange {
    offset: u64,
    length: u64,
}

pub(super) struct Executor<'a> {
    pub(super) disk: &'a Disk,
    pub(super) io: &'a DiskIo,
    /// Negotiated features.
    pub(super) features: u64,
}

impl Executor<'_> {
    /// Executes the request, writes its status, and returns how many bytes were written from the first writable one on.
    pub(super) fn execute(&self, memory: &GuestMemory, request: Request<'_>) -> Result<u32, DriverError> {
        let (status, data) = match request.operation.and_then(|operation| self.operate(operation)) {
            Ok(data) => (Status::Ok, data),
            Err(status) => (status, 0),
        };
        memory.write_obj(status as u8, request.status).map_err(|_| DriverError::Status)?;
        // The status only counts as written if all that comes before it was (virtio 1.2, 2.7.8.2).
        Ok(if data == request.writable { data.saturating_add(1) } else { data })
    }

    /// Returns how many bytes of data were written to guest memory.
    fn operate(&self, operation: Operation<'_>) -> Result<u32, Status> {
        match operation {
            Operation::In { sector, data } => {
                let range = self.range_of_data(sector, &data)?;
                self.io.read(&data, range.offset).map_err(failed)?;
                Ok(u32::try_from(range.length).unwrap_or(u32::MAX))
            }
            Operation::Out { sector, data } => {
                self.writable()?;
                let range = self.range_of_data(sector, &data)?;
                self.io.write(&data, range.offset).map_err(failed)?;
                self.write_through()
            }
            Operation::Flush => self.io.flush().map_err(failed).map(|()| 0),
            Operation::GetId { data } => Ok(self.write_id(&data)),
            Operation::Discard(ranges) => {
                self.negotiated(VIRTIO_BLK_F_DISCARD)?;
                for range in self.ranges(&ranges, 0, MAX_DISCARD_SECTORS)? {
                    self.io.discard(range.offset, range.length).map_err(failed)?;
                }
                self.write_through()
            }
            Operation::WriteZeroes(ranges) => {
                self.negotiated(VIRTIO_BLK_F_WRITE_ZEROES)?;
                for (range, asked) in self.ranges(&ranges, UNMAP, MAX_ZEROES_SECTORS)?.iter().zip(&ranges) {
                    self.io.write_zeroes(range.offset, range.length, asked.flags & UNMAP != 0).map_err(failed)?;
                }
                self.write_through()
            }
        }
    }

    fn writable(&self) -> Result<(), Status> {
        if self.disk.config().readonly { Err(Status::IoError) } else { Ok(()) }
    }

    fn negotiated(&self, feature: u32) -> Result<(), Status> {
        if self.features >> feature & 1 == 1 { Ok(()) } else { Err(Status::Unsupported) }
    }

    /// A driver that did not take FLUSH cannot ask for durability, so every write is durable for it (virtio 1.2, 5.2.6.2).
    fn write_through(&self) -> Result<u32, Status> {
        if self.negotiated(VIRTIO_BLK_F_FLUSH).is_err() {
            self.io.flush().map_err(failed)?;
        }
        Ok(0)
    }

    fn write_id(&self, data: &[GuestSlice<'_>]) -> u32 {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (target, byte) in id.iter_mut().zip(self.disk.config().id.bytes()) {
            *target = byte;
        }
        let mut rest = id.as_slice();
        for slice in data {
            slice.copy_from(rest);
            rest = rest.get(slice.len()..).unwrap_or_default();
        }
        (id.len() - rest.len()) as u32
    }

    fn range_of_data(&self, sector: u64, data: &[GuestSlice<'_>]) -> Result<ByteRange, Status> {
        let length: u64 = data.iter().map(|slice| slice.len() as u64).sum();
        if length.is_multiple_of(SECTOR_SIZE) { self.range(sector, length / SECTOR_SIZE) } else { Err(Status::IoError) }
    }

    /// Checks all ranges before anything is done to one of them.
    fn ranges(&self, ranges: &[SectorRange], flags: u32, max_sectors: u32) -> Result<Vec<ByteRange>, Status> {
        let check = |range: &SectorRange| {
            if range.flags & !flags != 0 {
                Err(Status::Unsupported)
            } else if range.sectors > max_sectors {
                Err(Status::IoError)
            } else {
                self.range(range.sector, u64::from(range.sectors))
            }
        };
        ranges.iter().map(check).collect()
    }

    fn range(&self, sector: u64, sectors: u64) -> Result<ByteRange, Status> {
        match sector.checked_add(sectors) {
            Some(end) if end <= self.disk.size() / SECTOR_SIZE => {
                Ok(ByteRange { offset: sector * SECTOR_SIZE, length: sectors * SECTOR_SIZE })
            }
            _ => Err(Status::IoError),
        }
    }
}

fn failed(_: io::Error) -> Status {
    Status::IoError
}
