//! The guest's physical memory map, in E820 terms, which PVH shares.

use super::ONE_MIB;
use crate::memory::GuestRam;

/// End of conventional memory: above it a PC has the extended BIOS data area.
const EBDA: u64 = 0x9fc00;

/// E820 type of usable memory.
pub const RAM: u32 = 1;
/// E820 type of memory to keep away from.
pub const RESERVED: u32 = 2;

/// One range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// [`RAM`] or [`RESERVED`].
    pub kind: u32,
}

/// The ranges of `ram` in ascending order. The ACPI tables lie in the reserved range below 1 MiB.
pub fn ranges(ram: &GuestRam) -> Vec<Range> {
    let mut ranges = vec![Range { start: 0, size: EBDA, kind: RAM }, Range { start: EBDA, size: ONE_MIB - EBDA, kind: RESERVED }];
    for slot in ram.slots() {
        let (start, end) = (slot.start.0.max(ONE_MIB), slot.start.0 + slot.run.bytes());
        ranges.push(Range { start, size: end - start, kind: RAM });
    }
    ranges
}
