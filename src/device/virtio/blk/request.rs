//! Requests as the driver lays them out in guest memory. Nothing in it is trusted, and everything is read once.
//!
//! How a request is cut into descriptors is the driver's business (virtio 1.2, 2.7.4): the header is the first 16 readable bytes, the status
//! the last writable byte, wherever they lie.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::bitmap::MS;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::super::{Chain, DriverError, QUEUE_SIZE};
use super::config::{MAX_DISCARD_RANGES, MAX_ZEROES_RANGES};
use crate::memory::ram::GuestMemory;

/// A piece of guest memory whose writes are tracked.
pub type GuestSlice<'m> = VolatileSlice<'m, MS<'m, GuestMemory>>;

/// Size of a range: sector, number of sectors, flags (`struct virtio_blk_discard_write_zeroes`).
const RANGE_SIZE: usize = 16;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// The request is malformed, out of range, or the image failed.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// The device does not know such requests.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// A range of a discard or write-zeroes request, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorRange {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP` and bits without a meaning.
    pub flags: u32,
}

/// What the driver asks for. The buffers lie in guest RAM; sectors are unchecked.
#[derive(Debug)]
pub enum Operation<'m> {
    /// Read from `sector` on.
    In {
        /// First sector.
        sector: u64,
        /// Where to.
        data: Vec<GuestSlice<'m>>,
    },
    /// Write from `sector` on.
    Out {
        /// First sector.
        sector: u64,
        /// Where from.
        data: Vec<GuestSlice<'m>>,
    },
    /// Make what was written durable.
    Flush,
    /// Tell the disk's name.
    GetId {
        /// Where to.
        data: Vec<GuestSlice<'m>>,
    },
    /// Forget these ranges.
    Discard(Vec<SectorRange>),
    /// Make these ranges zero.
    WriteZeroes(Vec<SectorRange>),
}

/// A request whose status can be reported.
#[derive(Debug)]
pub struct Request<'m> {
    /// The operation, or the status that a malformed request deserves.
    pub operation: Result<Operation<'m>, Status>,
    /// Where the status goes: a byte of guest RAM.
    pub status: GuestAddress,
    /// Writable bytes before the status.
    pub writable: u32,
}

impl<'m> Request<'m> {
    /// Takes a chain of descriptors apart. An error means that not even a status can be reported.
    pub fn parse(memory: &'m GuestMemory, chain: Chain<'m>) -> Result<Self, DriverError> {
        let mut readable = Buffers { memory, pieces: Vec::new() };
        let mut writable = Buffers { memory, pieces: Vec::new() };
        let mut out_of_order = false;
        let mut more = true;
        for (count, descriptor) in chain.enumerate() {
            if count >= usize::from(QUEUE_SIZE) {
                return Err(DriverError::Chain);
            }
            more = descriptor.has_next();
            let buffers = if descriptor.is_write_only() {
                &mut writable
            } else {
                // virtio 1.2, 2.7.4.2: what the device writes comes after what it reads.
                out_of_order |= !writable.pieces.is_empty();
                &mut readable
            };
            if descriptor.len() > 0 {
                buffers.pieces.push((descriptor.addr(), descriptor.len()));
            }
        }
        // The iterator ends silently where it cannot follow the chain; then the last descriptor it gave had a successor.
        if more {
            return Err(DriverError::Chain);
        }
        let status = writable.take_last().filter(|&status| memory.address_in_range(status)).ok_or(DriverError::Status)?;
        // The chain as a whole is shorter than 4 GiB, which the iterator checked.
        let length = u32::try_from(writable.length()).map_err(|_| DriverError::Chain)?;
        let operation = if out_of_order { Err(Status::IoError) } else { operation(readable, &writable) };
        Ok(Request { operation, status, writable: length })
    }
}

fn operation<'m>(mut readable: Buffers<'m>, writable: &Buffers<'m>) -> Result<Operation<'m>, Status> {
    // Header: type, reserved, sector (`struct virtio_blk_req`).
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = readable.take()?;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    match kind {
        VIRTIO_BLK_T_IN => Ok(Operation::In { sector, data: writable.slices()? }),
        VIRTIO_BLK_T_OUT => Ok(Operation::Out { sector, data: readable.slices()? }),
        VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Operation::GetId { data: writable.slices()? }),
        VIRTIO_BLK_T_DISCARD => Ok(Operation::Discard(ranges(readable, MAX_DISCARD_RANGES)?)),
        VIRTIO_BLK_T_WRITE_ZEROES => Ok(Operation::WriteZeroes(ranges(readable, MAX_ZEROES_RANGES)?)),
        _ => Err(Status::Unsupported),
    }
}

fn ranges(mut readable: Buffers<'_>, max: u32) -> Result<Vec<SectorRange>, Status> {
    let length = readable.length();
    if length == 0 || !length.is_multiple_of(RANGE_SIZE as u64) || length / RANGE_SIZE as u64 > u64::from(max) {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::new();
    while readable.length() > 0 {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = readable.take()?;
        ranges.push(SectorRange {
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
        });
    }
    Ok(ranges)
}

/// The readable or the writable part of a chain; none of its pieces is empty, and they may lie anywhere.
struct Buffers<'m> {
    memory: &'m GuestMemory,
    pieces: Vec<(GuestAddress, u32)>,
}

impl<'m> Buffers<'m> {
    fn length(&self) -> u64 {
        self.pieces.iter().map(|&(_, length)| u64::from(length)).sum()
    }

    /// Reads and removes the first `N` bytes.
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Status> {
        let mut bytes = [0; N];
        let mut rest = bytes.as_mut_slice();
        while !rest.is_empty() {
            let (address, length) = self.pieces.first_mut().ok_or(Status::IoError)?;
            let count = rest.len().min(*length as usize);
            let (target, after) = rest.split_at_mut_checked(count).ok_or(Status::IoError)?;
            self.memory.read_slice(target, *address).map_err(|_| Status::IoError)?;
            rest = after;
            *length -= count as u32;
            match *length {
                0 => drop(self.pieces.remove(0)),
                _ => *address = GuestAddress(address.0.checked_add(count as u64).ok_or(Status::IoError)?),
            }
        }
        Ok(bytes)
    }

    /// Removes the last byte and returns its address.
    fn take_last(&mut self) -> Option<GuestAddress> {
        let (address, length) = self.pieces.last_mut()?;
        *length -= 1;
        let last = address.0.checked_add(u64::from(*length))?;
        if *length == 0 {
            self.pieces.pop();
        }
        Some(GuestAddress(last))
    }

    /// What is left, as host memory.
    fn slices(&self) -> Result<Vec<GuestSlice<'m>>, Status> {
        let slice = |&(address, length): &(GuestAddress, u32)| self.memory.get_slice(address, length as usize);
        self.pieces.iter().map(slice).collect::<Result<_, _>>().map_err(|_| Status::IoError)
    }
}

#[cfg(test)]
mod tests;
