//! ELF kernels: by the PVH note where they have one, by Linux's 64-bit boot protocol otherwise.

use std::fs::File;
use std::os::unix::fs::FileExt;

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

/// How the header of every ELF file for x86-64 begins: magic number, 64 bits, little-endian.
const IDENT: [u8; 6] = *b"\x7fELF\x02\x01";
/// Type of an executable with a place in memory of its own, as opposed to programs, modules and libraries that are put somewhere.
const ET_EXEC: u16 = 2;
/// x86-64.
const EM_X86_64: u16 = 62;

pub fn load(file: &mut File, handover: &Handover) -> Result<Entry, BootError> {
    // linux-loader looks at neither processor nor type.
    let mut header = [0; 20];
    let is_complete = file.read_exact_at(&mut header, 0).is_ok();
    let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    if !is_complete || !header.starts_with(&IDENT) || word(18) != EM_X86_64 {
        return Err(handover.not_a_kernel("it is an ELF file, but not one for x86-64"));
    }
    let loaded = Elf::load(handover.ram.memory(), None, file, None).map_err(|error| match error {
        LoaderError::Elf(linux_loader::loader::elf::Error::ReadKernelImage) => {
            let size = file.metadata().map_or(0, |metadata| metadata.len());
            BootError::TooBig { what: format!("the kernel {}", handover.kernel.display()), size, address: 0 }
        }
        other => handover.not_a_kernel(other.to_string()),
    })?;
    let has_entry = matches!(loaded.pvh_boot_cap, PvhBootCapability::PvhEntryPresent(_));
    if word(16) != ET_EXEC && !has_entry {
        return Err(handover.not_a_kernel("it is a program, a module or a library"));
    }
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
