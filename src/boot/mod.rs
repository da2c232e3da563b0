//! From kernel, initrd and command line to a guest that can be entered: what firmware and boot loader do on a real PC.

mod acpi;
mod bzimage;
mod elf;
mod entry;
mod memory_map;
mod zero_page;

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

pub use entry::{Entry, firmware_state};

use crate::memory::ram::HOLE_START;
use crate::memory::{GuestRam, PAGE_SIZE};
use crate::vm::config::GuestConfig;

/// Where the ACPI tables are, the RSDP first: in the BIOS area, which the memory map keeps reserved and where the RSDP is looked for.
const ACPI: u64 = 0xe0000;
/// End of the BIOS area; also where a kernel may be loaded at the lowest.
const ONE_MIB: u64 = 0x10_0000;
/// The command line.
const CMDLINE: u64 = 0x20000;
/// Room for the command line in bytes, its final NUL included.
const CMDLINE_SIZE: usize = 0x10000;

/// Why a guest cannot be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read the {what} {}: {source}", path.display())]
    Read {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no kernel that this machine can boot.
    #[error("{} is not a kernel that can be booted: {reason}; give a Linux bzImage or an ELF kernel for x86-64", path.display())]
    NotAKernel {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// RAM is too small for what is to be loaded.
    #[error("{what} ({size} bytes) does not fit into the guest's memory at {address:#x}; give the guest more --memory")]
    TooBig {
        /// What does not fit.
        what: String,
        /// Its size in bytes.
        size: u64,
        /// Where it would have gone.
        address: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {length} bytes, this kernel takes {limit}; shorten --cmdline")]
    Cmdline {
        /// Length of the command line in bytes.
        length: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// The command line cannot be told from a shorter one.
    #[error("the kernel command line contains a NUL character; remove it from --cmdline")]
    CmdlineNul,
}

/// What every boot protocol hands to the kernel.
struct Handover<'a> {
    /// Guest memory being filled.
    ram: &'a GuestRam,
    /// The file, for messages.
    kernel: &'a Path,
    /// Command line without its NUL.
    cmdline: &'a str,
    /// Initial RAM disk.
    initrd: Option<Vec<u8>>,
}

/// Loads the guest of `config` into `ram`, with ACPI tables that show virtio devices in `slots`. Returns how it is entered.
pub fn load(config: &GuestConfig, ram: &GuestRam, slots: &[usize]) -> Result<Entry, BootError> {
    let read_error = |what, path: &Path, source| BootError::Read { what, path: path.to_owned(), source };
    let kernel_error = |source| read_error("kernel", &config.kernel, source);
    let mut kernel = File::open(&config.kernel).map_err(kernel_error)?;
    let mut magic = [0; 4];
    let is_elf = match kernel.read_exact(&mut magic) {
        Ok(()) => magic == *b"\x7fELF",
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => false,
        Err(error) => return Err(kernel_error(error)),
    };
    kernel.rewind().map_err(kernel_error)?;
    let initrd = match &config.initrd {
        Some(path) => Some(std::fs::read(path).map_err(|source| read_error("initrd", path, source))?),
        None => None,
    };
    if config.cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    if config.cmdline.len() >= CMDLINE_SIZE {
        return Err(BootError::Cmdline { length: config.cmdline.len(), limit: CMDLINE_SIZE - 1 });
    }
    place(ram, "kernel command line", &[config.cmdline.as_bytes(), b"\0"].concat(), CMDLINE)?;
    place(ram, "ACPI tables", &acpi::tables(ACPI, config.cpus, slots), ACPI)?;
    let handover = Handover { ram, kernel: &config.kernel, cmdline: &config.cmdline, initrd };
    let entry = if is_elf { elf::load(&mut kernel, &handover)? } else { bzimage::load(&mut kernel, &handover)? };
    entry.write_tables(ram)?;
    Ok(entry)
}

impl Handover<'_> {
    /// Puts the initrd as high as it goes below the hole and `limit`, clear of the kernel, which ends at `kernel_end`. Returns address
    /// and size, zeros where there is none.
    fn place_initrd(&self, kernel_end: u64, limit: u64) -> Result<(u64, u64), BootError> {
        let Some(initrd) = &self.initrd else { return Ok((0, 0)) };
        let size = initrd.len() as u64;
        let top = self.ram.size().min(HOLE_START).min(limit);
        let address = top.checked_sub(size).map(|address| address / PAGE_SIZE as u64 * PAGE_SIZE as u64);
        let address = address.filter(|address| *address >= kernel_end);
        let address = address.ok_or_else(|| BootError::TooBig { what: "the initrd".into(), size, address: kernel_end })?;
        place(self.ram, "initrd", initrd, address)?;
        Ok((address, size))
    }

    fn not_a_kernel(&self, reason: impl Into<String>) -> BootError {
        BootError::NotAKernel { path: self.kernel.to_owned(), reason: reason.into() }
    }
}

/// Writes `bytes` to guest address `address`.
fn place(ram: &GuestRam, what: &str, bytes: &[u8], address: u64) -> Result<(), BootError> {
    ram.memory().write_slice(bytes, GuestAddress(address)).map_err(|_| BootError::TooBig {
        what: format!("the {what}"),
        size: bytes.len() as u64,
        address,
    })
}

#[cfg(test)]
mod tests;
