//! Dispatch of port and memory accesses to devices.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// A device that answers accesses to a range of ports or guest addresses.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes at `offset` within the device's range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` within the device's range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Two devices were given the same address.
#[derive(Debug, Error)]
#[error("bus range {start:#x}+{length:#x} overlaps another device")]
pub struct Overlap {
    /// First address of the refused range.
    pub start: u64,
    /// Its length.
    pub length: u64,
}

/// An address space of devices; one for ports, one for MMIO. Built once, then shared by the vCPU threads.
#[derive(Default)]
pub struct Bus {
    ranges: BTreeMap<u64, (u64, Arc<Mutex<dyn BusDevice>>)>,
}

impl Bus {
    /// Puts `device` at `start`, `length` addresses long.
    pub fn insert(&mut self, start: u64, length: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), Overlap> {
        let overlap = Overlap { start, length };
        let Some(end) = start.checked_add(length) else { return Err(overlap) };
        let before = self.ranges.range(..end).next_back();
        if length == 0 || before.is_some_and(|(other, (other_length, _))| other + other_length > start) {
            return Err(overlap);
        }
        self.ranges.insert(start, (length, device));
        Ok(())
    }

    /// Reads from the device at `address`; where there is none, or the access reaches beyond it, all bits are ones, as on a bus that
    /// nobody drives.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address`; where there is none the write is lost.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let (start, (size, device)) = self.ranges.range(..=address).next_back()?;
        let offset = address - start;
        (offset < *size && length as u64 <= size - offset).then_some((offset, &**device))
    }
}
