//! Linux bzImage by its 64-bit entry (Documentation/arch/x86/boot.rst, "64-bit boot protocol"). The image decompresses itself.

use std::fs::File;

use linux_loader::loader::{BzImage, Error as LoaderError, KernelLoader};
use vm_memory::GuestAddress;

use super::{BootError, Entry, Handover, ONE_MIB, zero_page};

/// Where the 64-bit entry is in the protected-mode part of the image.
const ENTRY_64: u64 = 0x200;
/// `xloadflags`: the image has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// First version of the boot protocol with `xloadflags`.
const VERSION_2_12: u16 = 0x20c;

pub fn load(file: &mut File, handover: &Handover) -> Result<Entry, BootError> {
    let loaded = BzImage::load(handover.ram.memory(), None, file, Some(GuestAddress(ONE_MIB))).map_err(|error| match error {
        LoaderError::Bzimage(linux_loader::loader::bzimage::Error::ReadBzImageCompressedKernel) => {
            let size = file.metadata().map_or(0, |metadata| metadata.len());
            BootError::TooBig { what: format!("the kernel {}", handover.kernel.display()), size, address: ONE_MIB }
        }
        LoaderError::Bzimage(_) => handover.not_a_kernel("it is neither a bzImage nor an ELF file"),
        other => handover.not_a_kernel(other.to_string()),
    })?;
    let header = loaded.setup_header.ok_or_else(|| handover.not_a_kernel("it has no setup header"))?;
    if header.version < VERSION_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(handover.not_a_kernel("it has no 64-bit entry (Linux 3.8 or later has one)"));
    }
    let limit = header.cmdline_size as usize;
    if handover.cmdline.len() > limit {
        return Err(BootError::Cmdline { length: handover.cmdline.len(), limit });
    }
    // The kernel unpacks itself to its preferred address or to where it was loaded, and needs `init_size` bytes there.
    let address = loaded.kernel_load.0.max(header.pref_address);
    let size = u64::from(header.init_size);
    let end = address.saturating_add(size).max(loaded.kernel_end);
    if end > handover.ram.size().min(crate::memory::ram::HOLE_START) {
        return Err(BootError::TooBig { what: format!("the unpacked kernel {}", handover.kernel.display()), size, address });
    }
    let initrd = handover.place_initrd(end, u64::from(header.initrd_addr_max).saturating_add(1))?;
    zero_page::write(handover, header, initrd)?;
    Ok(Entry::Long { rip: loaded.kernel_load.0 + ENTRY_64, boot_params: zero_page::ADDRESS })
}
