//! A polled virtio-blk driver over virtio-mmio (virtio 1.2, sections 2.7, 4.2 and 5.2), without interrupts.

use core::cell::UnsafeCell;
use core::fmt;
use core::ptr;
use core::sync::atomic::{Ordering::SeqCst, fence};

use pagestorm::page::{PAGE_SIZE, Words};

/// Where Ferry has its virtio-mmio devices, and where QEMU's microvm has: first address, distance, count.
const PLACES: [(u64, u64, u64); 2] = [(0xd000_0000, 0x1000, 12), (0xfeb0_0000, 0x200, 24)];

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE_SET: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_AVAILABLE: u64 = 0x090;
const QUEUE_USED: u64 = 0x0a0;
const CONFIG_CAPACITY: u64 = 0x100;

const MAGIC_VALUE: u32 = 0x7472_6976;
const BLOCK_DEVICE: u32 = 2;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

const F_READ_ONLY: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const F_VERSION_1: u64 = 1 << 32;

const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
const NO_INTERRUPT: u16 = 1;

/// Requests that can be in flight.
pub const SLOTS: usize = 4;
/// 512-byte sectors in a block of ours.
pub const SECTORS_PER_BLOCK: u64 = PAGE_SIZE as u64 / 512;
/// A power of two, enough for three descriptors a slot.
const QUEUE_SIZE: usize = 16;

#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
struct Available {
    flags: u16,
    index: u16,
    ring: [u16; QUEUE_SIZE],
}

#[repr(C, align(4))]
struct Used {
    flags: u16,
    index: u16,
    ring: [[u32; 2]; QUEUE_SIZE],
}

#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// `struct virtio_blk_discard_write_zeroes`
#[repr(C)]
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// All memory that the device looks at.
#[repr(C, align(4096))]
struct Dma {
    data: [Words; SLOTS],
    descriptors: [Descriptor; QUEUE_SIZE],
    available: Available,
    used: Used,
    headers: [Header; SLOTS],
    ranges: [Range; SLOTS],
    status: [u8; SLOTS],
}

struct DmaCell(UnsafeCell<Dma>);

// SAFETY: only the one `Device`, which `Device::find` hands to the boot vCPU, goes there.
unsafe impl Sync for DmaCell {}

// SAFETY: integers, for which zero is a value.
static DMA: DmaCell = DmaCell(UnsafeCell::new(unsafe { core::mem::zeroed() }));

/// What the device is asked to do with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Into the slot's buffer.
    Read,
    /// From the slot's buffer.
    Write,
    /// Everything, not a block.
    Flush,
    /// The block may hold anything after that.
    Discard,
    /// The block is zero after that.
    WriteZeroes,
}

impl Request {
    fn kind(self) -> u32 {
        match self {
            Request::Read => 0,
            Request::Write => 1,
            Request::Flush => 4,
            Request::Discard => 11,
            Request::WriteZeroes => 13,
        }
    }
}

/// Why there is no disk to work on.
#[derive(Clone, Copy, Debug)]
pub enum NoDisk {
    /// No block device in any known place.
    NotFound,
    /// It is of virtio before 1.0.
    Legacy,
    /// It can only be read.
    ReadOnly,
    /// It does not take our features or queue.
    Refused,
}

impl fmt::Display for NoDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoDisk::NotFound => "disk_not_found",
            NoDisk::Legacy => "disk_is_legacy_virtio",
            NoDisk::ReadOnly => "disk_is_read_only",
            NoDisk::Refused => "disk_refuses_driver",
        })
    }
}

/// The first block device.
pub struct Device {
    base: u64,
    features: u64,
    next_available: u16,
    next_used: u16,
}

impl Device {
    /// Finds the first block device and gets it ready. To be called once.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn find() -> Result<Self, NoDisk> {
        let mut addresses = PLACES
            .iter()
            .flat_map(|&(first, distance, count)| (0..count).map(move |n| first + n * distance));
        let is_disk = |&base: &u64| {
            // SAFETY: mapped; reading what is not there gives all ones.
            let read = |register| unsafe { ((base + register) as *const u32).read_volatile() };
            read(MAGIC) == MAGIC_VALUE && read(DEVICE_ID) == BLOCK_DEVICE
        };
        let base = addresses.find(is_disk).ok_or(NoDisk::NotFound)?;
        let mut device = Device {
            base,
            features: 0,
            next_available: 0,
            next_used: 0,
        };
        if device.read(VERSION) != 2 {
            return Err(NoDisk::Legacy);
        }
        device.negotiate()?;
        device.set_up_queue()?;
        device.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        Ok(device)
    }

    fn read(&self, register: u64) -> u32 {
        // SAFETY: a register of the device.
        unsafe { ((self.base + register) as *const u32).read_volatile() }
    }

    fn write(&self, register: u64, value: u32) {
        // SAFETY: a register of the device, which is told of no memory but DMA.
        unsafe { ((self.base + register) as *mut u32).write_volatile(value) }
    }

    fn write_address(&self, register: u64, address: u64) {
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }

    fn negotiate(&mut self) -> Result<(), NoDisk> {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.write(DEVICE_FEATURES_SELECT, 0);
        let low = self.read(DEVICE_FEATURES);
        self.write(DEVICE_FEATURES_SELECT, 1);
        let offered = u64::from(self.read(DEVICE_FEATURES)) << 32 | u64::from(low);
        if offered & F_VERSION_1 == 0 {
            return Err(NoDisk::Legacy);
        }
        if offered & F_READ_ONLY != 0 {
            return Err(NoDisk::ReadOnly);
        }
        self.features = offered & (F_VERSION_1 | F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
        self.write(DRIVER_FEATURES_SELECT, 0);
        self.write(DRIVER_FEATURES, self.features as u32);
        self.write(DRIVER_FEATURES_SELECT, 1);
        self.write(DRIVER_FEATURES, (self.features >> 32) as u32);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.read(STATUS) & FEATURES_OK == 0 {
            Err(NoDisk::Refused)
        } else {
            Ok(())
        }
    }

    fn set_up_queue(&mut self) -> Result<(), NoDisk> {
        self.write(QUEUE_SELECT, 0);
        if (self.read(QUEUE_SIZE_MAX) as usize) < QUEUE_SIZE {
            return Err(NoDisk::Refused);
        }
        let dma = DMA.0.get();
        // SAFETY: inside DMA, which is this device's alone.
        unsafe { (&raw mut (*dma).available.flags).write_volatile(NO_INTERRUPT) };
        self.write(QUEUE_SIZE_SET, QUEUE_SIZE as u32);
        // SAFETY: only addresses are taken.
        unsafe {
            self.write_address(QUEUE_DESCRIPTORS, &raw const (*dma).descriptors as u64);
            self.write_address(QUEUE_AVAILABLE, &raw const (*dma).available as u64);
            self.write_address(QUEUE_USED, &raw const (*dma).used as u64);
        }
        self.write(QUEUE_READY, 1);
        Ok(())
    }

    /// How many blocks of ours the disk holds.
    pub fn blocks(&self) -> u64 {
        let (low, high) = (self.read(CONFIG_CAPACITY), self.read(CONFIG_CAPACITY + 4));
        (u64::from(high) << 32 | u64::from(low)) / SECTORS_PER_BLOCK
    }

    /// Whether the device takes such requests.
    pub fn takes(&self, request: Request) -> bool {
        match request {
            Request::Read | Request::Write => true,
            Request::Flush => self.features & F_FLUSH != 0,
            Request::Discard => self.features & F_DISCARD != 0,
            Request::WriteZeroes => self.features & F_WRITE_ZEROES != 0,
        }
    }

    /// A slot's buffer, which must not be in flight.
    pub fn data(&mut self, slot: usize) -> &mut Words {
        // SAFETY: DMA is this device's alone, the index is checked, and the device writes to slots in flight only.
        let words = unsafe { &raw mut (*DMA.0.get()).data[slot] };
        // SAFETY: as above. The compiler must not assume that it knows what is there.
        unsafe { &mut *core::hint::black_box(words) }
    }

    /// Sends a request for `block` (below [`Device::blocks`]) from a slot that is not in flight.
    pub fn submit(&mut self, slot: usize, request: Request, block: u64) {
        let dma = DMA.0.get();
        let sector = block * SECTORS_PER_BLOCK;
        let (first, second, third) = (slot * 3, slot * 3 + 1, slot * 3 + 2);
        // SAFETY: DMA is this device's alone, and indices are checked.
        unsafe {
            let in_request = if request == Request::Flush { 0 } else { sector };
            let header = Header {
                kind: request.kind(),
                reserved: 0,
                sector: in_request,
            };
            ptr::write_volatile(&raw mut (*dma).headers[slot], header);
            ptr::write_volatile(&raw mut (*dma).status[slot], 0xff);
            let range = Range {
                sector,
                sectors: SECTORS_PER_BLOCK as u32,
                flags: 0,
            };
            ptr::write_volatile(&raw mut (*dma).ranges[slot], range);
            let (address, length, flags) = match request {
                Request::Read => (
                    &raw const (*dma).data[slot] as u64,
                    PAGE_SIZE,
                    NEXT | DEVICE_WRITES,
                ),
                Request::Discard | Request::WriteZeroes => (
                    &raw const (*dma).ranges[slot] as u64,
                    size_of::<Range>(),
                    NEXT,
                ),
                Request::Write | Request::Flush => {
                    (&raw const (*dma).data[slot] as u64, PAGE_SIZE, NEXT)
                }
            };
            let after_header = if request == Request::Flush {
                third
            } else {
                second
            };
            let chain = [
                Descriptor {
                    address: &raw const (*dma).headers[slot] as u64,
                    length: size_of::<Header>() as u32,
                    flags: NEXT,
                    next: after_header as u16,
                },
                Descriptor {
                    address,
                    length: length as u32,
                    flags,
                    next: third as u16,
                },
                Descriptor {
                    address: &raw const (*dma).status[slot] as u64,
                    length: 1,
                    flags: DEVICE_WRITES,
                    next: 0,
                },
            ];
            for (index, descriptor) in (first..).zip(chain) {
                ptr::write_volatile(&raw mut (*dma).descriptors[index], descriptor);
            }
            let place = usize::from(self.next_available) % QUEUE_SIZE;
            ptr::write_volatile(&raw mut (*dma).available.ring[place], first as u16);
            self.next_available = self.next_available.wrapping_add(1);
            // The device may look as soon as the index is there.
            fence(SeqCst);
            ptr::write_volatile(&raw mut (*dma).available.index, self.next_available);
        }
        fence(SeqCst);
        self.write(QUEUE_NOTIFY, 0);
    }

    /// A request that the device has finished: descriptor that it names and status byte, 0 if it went well.
    /// Slot n's descriptor is 3 * n.
    pub fn poll(&mut self) -> Option<(u32, u8)> {
        let dma = DMA.0.get();
        // SAFETY: DMA is this device's alone, and indices are checked.
        unsafe {
            if ptr::read_volatile(&raw const (*dma).used.index) == self.next_used {
                return None;
            }
            fence(SeqCst);
            let place = usize::from(self.next_used) % QUEUE_SIZE;
            let [head, _length] = ptr::read_volatile(&raw const (*dma).used.ring[place]);
            self.next_used = self.next_used.wrapping_add(1);
            let slot = head as usize / 3;
            let status = if slot < SLOTS {
                ptr::read_volatile(&raw const (*dma).status[slot])
            } else {
                0xff
            };
            Some((head, status))
        }
    }
}
