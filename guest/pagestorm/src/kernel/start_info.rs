//! What the loader tells: `hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h).

use core::slice;

use pagestorm::layout::{MAX_REGIONS, Region};

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
const MAX_COMMAND_LINE: usize = 4096;
const MAX_ENTRIES: usize = 128;

#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    // From version 1 on.
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// What is used of it, copied, because pages are filled over where it was.
pub struct Loaded {
    command_line: [u8; MAX_COMMAND_LINE],
    command_line_length: usize,
    regions: [Region; MAX_REGIONS],
    region_count: usize,
}

impl Loaded {
    /// Copies what `hvm_start_info` at `address` says; None if it is not of version 1 or later.
    pub fn read(address: u32) -> Option<Self> {
        // SAFETY: the boot protocol promises the structure at the address in %ebx, in mapped memory.
        let info = unsafe { &*(address as *const StartInfo) };
        if info.magic != MAGIC || info.version < 1 {
            return None;
        }
        let mut loaded = Loaded {
            command_line: [0; MAX_COMMAND_LINE],
            command_line_length: 0,
            regions: [Region::default(); MAX_REGIONS],
            region_count: 0,
        };
        loaded.copy_command_line(info.command_line);
        let entries = (info.memory_map_entries as usize).min(MAX_ENTRIES);
        // SAFETY: the boot protocol promises so many entries there.
        let entries =
            unsafe { slice::from_raw_parts(info.memory_map as *const MemoryMapEntry, entries) };
        let ram = entries.iter().filter(|entry| entry.kind == RAM);
        for (region, entry) in loaded.regions.iter_mut().zip(ram) {
            *region = Region {
                start: entry.address,
                end: entry.address.saturating_add(entry.size),
            };
            loaded.region_count += 1;
        }
        Some(loaded)
    }

    fn copy_command_line(&mut self, address: u64) {
        if address == 0 {
            return;
        }
        for place in &mut self.command_line {
            // SAFETY: the boot protocol promises a string that ends in zero.
            match unsafe { *((address as usize + self.command_line_length) as *const u8) } {
                0 => break,
                byte => *place = byte,
            }
            self.command_line_length += 1;
        }
    }

    /// The command line, empty if it is not UTF-8.
    pub fn command_line(&self) -> &str {
        str::from_utf8(&self.command_line[..self.command_line_length]).unwrap_or("")
    }

    /// RAM.
    pub fn ram(&self) -> &[Region] {
        &self.regions[..self.region_count]
    }
}
