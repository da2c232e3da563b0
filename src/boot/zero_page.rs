//! Linux's boot parameters, the "zero page" (Documentation/arch/x86/zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::{ACPI, BootError, CMDLINE, Handover, memory_map, place};

/// Where the boot parameters are.
pub const ADDRESS: u64 = 0x7000;

/// `type_of_loader` of a boot loader without a number.
const UNKNOWN_LOADER: u8 = 0xff;

/// Writes the boot parameters with the kernel's own `header`, completed by the command line and the initrd at `initrd` (address, size).
pub fn write(handover: &Handover, mut header: setup_header, initrd: (u64, u64)) -> Result<(), BootError> {
    header.type_of_loader = UNKNOWN_LOADER;
    header.cmd_line_ptr = CMDLINE as u32;
    header.cmdline_size = handover.cmdline.len() as u32;
    // Both fit into 32 bits: the initrd lies below the hole.
    header.ramdisk_image = initrd.0 as u32;
    header.ramdisk_size = initrd.1 as u32;
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: ACPI, ..Default::default() };
    let ranges = memory_map::ranges(handover.ram);
    params.e820_entries = ranges.len() as u8;
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(ranges) {
        *entry = boot_e820_entry { addr: range.start, size: range.size, r#type: range.kind };
    }
    params.e820_table = table;
    place(handover.ram, "boot parameters", params.as_slice(), ADDRESS)
}
