//! ELF kernels: by the PVH note where they have one, by Linux's 64-bit boot protocol otherwise.

use std::fs::File;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{Error as LoaderError, KernelLoader};
use vm_memory::{Address, ByteValued};

use super::{ACPI, BootError, CMDLINE, Entry, Handover, memory_map, place, zero_page};

/// Where the PVH start info is; the module list and the memory map follow it.
const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6080;
const MEMORY_MAP: u64 = 0x6100;

/// Magic number of the start info (Xen's public/arch-x86/hvm/start_info.h), "xEn3" with the top bit of the E set.
const START_MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const START_VERSION: u32 = 1;

pub fn load(file: &mut File, handover: &Handover) -> Result<Entry, BootError> {
    let loaded = Elf::load(handover.ram.memory(), None, file, None).map_err(|error| match error {
        LoaderError::Elf(linux_loader::loader::elf::Error::ReadKernelImage) => {
            let size = file.metadata().map_or(0, |metadata| metadata.len());
            BootError::TooBig { what: format!("the kernel {}", handover.kernel.display()), size, address: 0 }
        }
        other => handover.not_a_kernel(other.to_string()),
    })?;
    let low_end = handover.ram.size().min(crate::memory::ram::HOLE_START);
    if loaded.kernel_end > low_end {
        let what = format!("the kernel {}", handover.kernel.display());
        return Err(BootError::TooBig { what, size: loaded.kernel_end, address: 0 });
    }
    let initrd = handover.place_initrd(loaded.kernel_end, u64::MAX)?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => pvh(handover, entry.raw_value() as u32, initrd),
        _ => {
            let header = setup_header {
                boot_flag: 0xaa55,
                header: u32::from_le_bytes(*b"HdrS"),
                kernel_alignment: 0x100_0000,
                ..Default::default()
            };
            zero_page::write(handover, header, initrd)?;
            Ok(Entry::Long { rip: loaded.kernel_load.raw_value(), boot_params: zero_page::ADDRESS })
        }
    }
}

/// Writes the start info of Xen's PVH protocol (docs/misc/pvh.pandoc).
fn pvh(handover: &Handover, eip: u32, (paddr, size): (u64, u64)) -> Result<Entry, BootError> {
    let ranges = memory_map::ranges(handover.ram);
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: u32::from(size > 0),
        modlist_paddr: if size > 0 { MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: ACPI,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: ranges.len() as u32,
        ..Default::default()
    };
    place(handover.ram, "start info", info.as_slice(), START_INFO)?;
    place(handover.ram, "module list", hvm_modlist_entry { paddr, size, ..Default::default() }.as_slice(), MODULES)?;
    for (index, range) in ranges.into_iter().enumerate() {
        let entry = hvm_memmap_table_entry { addr: range.start, size: range.size, type_: range.kind, ..Default::default() };
        place(handover.ram, "memory map", entry.as_slice(), MEMORY_MAP + (index * size_of::<hvm_memmap_table_entry>()) as u64)?;
    }
    Ok(Entry::Pvh { eip, start_info: START_INFO as u32 })
}
