//! Doing what a request asks for.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP as UNMAP,
};
use vm_memory::Bytes;

use super::super::{DriverError, Processed};
use super::config::{MAX_DISCARD_SECTORS, MAX_ZEROES_SECTORS};
use super::errors::Errors;
use super::request::{GuestSlice, Operation, Request, SectorRange, Status};
use crate::block::SECTOR_SIZE;
use crate::block::disk::{Disk, DiskIo};
use crate::block::io_error::{ErrorAction, IoOperation};
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
    pub(super) errors: &'a Errors,
}

/// Why a request was not done.
enum Failure {
    /// It is the driver's fault.
    Refused(Status),
    /// It is the image's.
    Io(IoOperation, io::Error),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Failure::Refused(status)
    }
}

impl Executor<'_> {
    /// Executes the request, writes its status, and returns how many bytes were written from the first writable one on. One that the
    /// image failed and that is to be done again has no status yet.
    pub(super) fn execute(&self, memory: &GuestMemory, request: Request<'_>) -> Result<Processed, DriverError> {
        let (status, data) = match request.operation.map_err(Failure::from).and_then(|operation| self.operate(operation)) {
            Ok(data) => (Status::Ok, data),
            Err(Failure::Refused(status)) => (status, 0),
            Err(Failure::Io(operation, error)) => match self.errors.failed(self.disk, operation, &error) {
                ErrorAction::Report => (Status::IoError, 0),
                ErrorAction::Stop => return Ok(Processed::Held),
            },
        };
        memory.write_obj(status as u8, request.status).map_err(|_| DriverError::Status)?;
        // The status only counts as written if all that comes before it was (virtio 1.2, 2.7.8.2).
        Ok(Processed::Done(if data == request.writable { data.saturating_add(1) } else { data }))
    }

    /// Returns how many bytes of data were written to guest memory.
    fn operate(&self, operation: Operation<'_>) -> Result<u32, Failure> {
        match operation {
            Operation::In { sector, data } => {
                let range = self.range_of_data(sector, &data)?;
                self.io.read(&data, range.offset).map_err(|error| Failure::Io(IoOperation::Read, error))?;
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
    fn write_through(&self) -> Result<u32, Failure> {
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

fn failed(error: io::Error) -> Failure {
    Failure::Io(IoOperation::Write, error)
}
