//! A virtio-blk driver that reaches the device as a guest does: by MMIO registers and rings in guest RAM.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::blk::VirtioBlk;
use super::mmio::VirtioMmio;
use crate::block::disk::Disk;
use crate::device::Device;
use crate::device::bus::Bus;
use crate::memory::{GuestRam, PageSet};
use crate::vm::config::{DiskConfig, DiskOptions};
use crate::vm::layout::VIRTIO_SIZE;

pub(super) const BASE: u64 = 0xd000_0000;
pub(super) const DESC: u64 = 0x1000;
pub(super) const AVAIL: u64 = 0x4000;
pub(super) const USED: u64 = 0x6000;
/// Headers and status bytes, 32 bytes for each request.
pub(super) const REQUESTS: u64 = 0x8000;
/// Free for data.
pub(super) const DATA: u64 = 0x10_0000;

pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const EVENT_IDX: u64 = 1 << 29;
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

const PATIENCE: Duration = Duration::from_secs(20);

/// A file of `size` bytes, a disk on it that is locked, and the directory that keeps both.
pub(super) fn scratch_disk(size: u64, readonly: bool) -> (tempfile::TempDir, Arc<Disk>) {
    scratch_disk_with(size, readonly, DiskOptions::default())
}

pub(super) fn scratch_disk_with(size: u64, readonly: bool, options: DiskOptions) -> (tempfile::TempDir, Arc<Disk>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    let disk = Disk::open(DiskConfig { id: "root".into(), path, readonly, options }).unwrap();
    disk.acquire().unwrap();
    (directory, disk)
}

pub(super) struct TestDriver {
    pub(super) ram: GuestRam,
    pub(super) device: Arc<VirtioMmio<VirtioBlk>>,
    bus: Bus,
    size: u16,
    pub(super) avail: u16,
    pub(super) used: u16,
}

/// A descriptor: address, length, flags other than NEXT.
pub(super) type Piece = (u64, u32, u16);

impl TestDriver {
    /// A device for `disk`, paused and not yet set up by the driver.
    pub(super) fn paused(disk: Arc<Disk>, ram: GuestRam) -> Self {
        Self::paused_with(VirtioBlk::new(disk, |_| {}), ram)
    }

    pub(super) fn paused_with(device: VirtioBlk, ram: GuestRam) -> Self {
        let device = VirtioMmio::new(ram.clone(), device).unwrap();
        let mut bus = Bus::default();
        bus.insert(BASE, VIRTIO_SIZE, device.bus_device()).unwrap();
        TestDriver { ram, device, bus, size: 16, avail: 0, used: 0 }
    }

    /// A running device, set up with all features it offers.
    pub(super) fn running(disk: Arc<Disk>) -> Self {
        let mut driver = Self::paused(disk, GuestRam::allocate(8 << 20).unwrap());
        driver.device.resume().unwrap();
        let features = driver.features();
        driver.set_up(features);
        driver
    }

    pub(super) fn read(&self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.bus.read(BASE + u64::from(register), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(super) fn write(&self, register: u32, value: u32) {
        self.bus.write(BASE + u64::from(register), &value.to_le_bytes());
    }

    pub(super) fn config(&self, offset: u64, length: usize) -> u64 {
        let mut bytes = [0; 8];
        self.bus.read(BASE + 0x100 + offset, &mut bytes[..length]);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn features(&self) -> u64 {
        let half = |sel| {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel);
            u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and drives it up to DRIVER_OK.
    pub(super) fn set_up(&mut self, features: u64) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.negotiate(features);
        self.set_up_queue();
        self.write(VIRTIO_MMIO_STATUS, 15);
        assert_eq!(self.read(VIRTIO_MMIO_STATUS), 15);
    }

    pub(super) fn negotiate(&self, features: u64) {
        self.write(VIRTIO_MMIO_STATUS, 1);
        self.write(VIRTIO_MMIO_STATUS, 3);
        for sel in 0..2 {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * sel)) as u32);
        }
        self.write(VIRTIO_MMIO_STATUS, 11);
    }

    pub(super) fn set_up_queue(&mut self) {
        for address in [AVAIL, USED] {
            self.ram.memory().write_slice(&[0; 0x1000], GuestAddress(address)).unwrap();
        }
        (self.avail, self.used) = (0, 0);
        self.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        self.write(VIRTIO_MMIO_QUEUE_NUM, u32::from(self.size));
        self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, DESC as u32);
        self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAIL as u32);
        self.write(VIRTIO_MMIO_QUEUE_USED_LOW, USED as u32);
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    pub(super) fn put<T: ByteValued>(&self, address: u64, value: T) {
        self.ram.memory().write_obj(value, GuestAddress(address)).unwrap();
    }

    pub(super) fn get<T: ByteValued>(&self, address: u64) -> T {
        self.ram.memory().read_obj(GuestAddress(address)).unwrap()
    }

    pub(super) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(super) fn put_descriptor(&self, table: u64, index: u16, piece: Piece, next: Option<u16>) {
        let at = table + 16 * u64::from(index);
        self.put(at, piece.0);
        self.put(at + 8, piece.1);
        self.put(at + 12, piece.2 | if next.is_some() { NEXT } else { 0 });
        self.put(at + 14, next.unwrap_or(0));
    }

    /// Writes a chain at the beginning of `table`.
    pub(super) fn put_chain(&self, table: u64, first: u16, pieces: &[Piece]) {
        for (index, piece) in (first..).zip(pieces) {
            let next = (usize::from(index - first) + 1 < pieces.len()).then_some(index + 1);
            self.put_descriptor(table, index, *piece, next);
        }
    }

    /// Makes the chain at `head` available without notifying.
    pub(super) fn offer(&mut self, head: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(self.avail % self.size), head);
        self.avail = self.avail.wrapping_add(1);
        self.put(AVAIL + 2, self.avail);
    }

    pub(super) fn notify(&self) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    }

    /// Puts header `slot` in place and returns the pieces of header and status.
    pub(super) fn header(&self, slot: u64, kind: u32, sector: u64) -> (Piece, Piece) {
        let at = REQUESTS + 32 * slot;
        self.put(at, kind);
        self.put(at + 4, 0u32);
        self.put(at + 8, sector);
        self.put(at + 16, 0xffu8);
        ((at, 16, 0), (at + 16, 1, WRITE))
    }

    pub(super) fn status(&self, slot: u64) -> u8 {
        self.get(REQUESTS + 32 * slot + 16)
    }

    /// Waits for the interrupt until `condition` holds.
    pub(super) fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < end, "the device does not answer");
            let event = self.device.interrupt_event();
            // SAFETY: `event` lives as long as the device.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(event)) };
            let timeout = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
            if poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1 {
                event.read().unwrap();
                self.write(VIRTIO_MMIO_INTERRUPT_ACK, self.read(VIRTIO_MMIO_INTERRUPT_STATUS));
            }
        }
    }

    pub(super) fn used_index(&self) -> u16 {
        self.get(USED + 2)
    }

    /// The element of the used ring with sequence number `index`: head and length.
    pub(super) fn used_element(&self, index: u16) -> (u32, u32) {
        let at = USED + 4 + 8 * u64::from(index % self.size);
        (self.get(at), self.get(at + 4))
    }

    /// Submits the chain at descriptor 0, waits for its completion and returns the used length.
    pub(super) fn run(&mut self, pieces: &[Piece]) -> u32 {
        self.put_chain(DESC, 0, pieces);
        // used_event: interrupt for the next completion.
        self.put(AVAIL + 4 + 2 * u64::from(self.size), self.used);
        self.offer(0);
        self.notify();
        let expected = self.used.wrapping_add(1);
        self.wait_until(|driver| driver.used_index() == expected);
        let (head, length) = self.used_element(self.used);
        assert_eq!(head, 0);
        self.used = expected;
        length
    }

    /// Runs a request with one data buffer; returns its status and used length.
    pub(super) fn request(&mut self, kind: u32, sector: u64, data: Option<Piece>) -> (u8, u32) {
        let (header, status) = self.header(0, kind, sector);
        let pieces: Vec<Piece> = [Some(header), data, Some(status)].into_iter().flatten().collect();
        let length = self.run(&pieces);
        (self.status(0), length)
    }

    /// Pages that devices wrote since the last call.
    pub(super) fn dirty(&self) -> Vec<u64> {
        let mut set = PageSet::empty(self.ram.pages());
        self.ram.take_device_writes(&mut set);
        set.runs().flat_map(|run| run.pages().map(|page| page.0)).collect()
    }
}
