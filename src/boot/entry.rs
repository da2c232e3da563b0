//! The state in which the first vCPU enters the kernel.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Error, VcpuFd};

use super::{BootError, place};
use crate::memory::GuestRam;

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
/// How many GiB the boot page tables map onto themselves: all that is below the hole, and the devices in it.
const IDENTITY_GIB: u64 = 4;

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PTE_PRESENT_WRITABLE: u64 = 3;
const PTE_LARGE: u64 = 1 << 7;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In long mode with identity-mapped memory (Linux boot protocol, "64-bit boot protocol").
    Long {
        /// First instruction.
        rip: u64,
        /// Guest address of the boot parameters.
        boot_params: u64,
    },
    /// In 32-bit protected mode without paging (Xen's PVH entry).
    Pvh {
        /// First instruction.
        eip: u32,
        /// Guest address of the start info.
        start_info: u32,
    },
}

impl Entry {
    /// Puts the descriptor table, and what page tables the entry needs, into RAM.
    pub(super) fn write_tables(self, ram: &GuestRam) -> Result<(), BootError> {
        let gdt: Vec<u8> =
            [0, 0, descriptor(self.code()), descriptor(data()), descriptor(task())].into_iter().flat_map(u64::to_le_bytes).collect();
        place(ram, "descriptor table", &gdt, GDT)?;
        if let Entry::Long { .. } = self {
            place(ram, "page tables", &(PDPT | PTE_PRESENT_WRITABLE).to_le_bytes(), PML4)?;
            for gib in 0..IDENTITY_GIB {
                let directory = PAGE_DIRECTORIES + gib * 0x1000;
                place(ram, "page tables", &(directory | PTE_PRESENT_WRITABLE).to_le_bytes(), PDPT + gib * 8)?;
                let entries = (0..512u64).map(|index| gib << 30 | index << 21 | PTE_LARGE | PTE_PRESENT_WRITABLE);
                let entries: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
                place(ram, "page tables", &entries, directory)?;
            }
        }
        Ok(())
    }

    /// Sets the registers of the first vCPU.
    pub fn apply(self, vcpu: &VcpuFd) -> Result<(), Error> {
        let mut sregs = vcpu.get_sregs()?;
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 5 * 8 - 1;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cs = self.code();
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data(), data(), data(), data(), data());
        sregs.tr = task();
        let mut regs = kvm_regs { rflags: 2, ..Default::default() };
        match self {
            Entry::Long { rip, boot_params } => {
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = PML4;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
                (regs.rip, regs.rsi) = (rip, boot_params);
            }
            Entry::Pvh { eip, start_info } => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                sregs.efer = 0;
                (regs.rip, regs.rbx) = (eip.into(), start_info.into());
            }
        }
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&regs)
    }

    fn code(self) -> kvm_segment {
        let long = matches!(self, Entry::Long { .. });
        let (l, db) = (u8::from(long), u8::from(!long));
        kvm_segment { selector: CODE, type_: 0xb, s: 1, l, db, ..flat() }
    }
}

fn flat() -> kvm_segment {
    kvm_segment { base: 0, limit: 0xffff_ffff, present: 1, g: 1, ..Default::default() }
}

fn data() -> kvm_segment {
    kvm_segment { selector: DATA, type_: 0x3, s: 1, db: 1, ..flat() }
}

fn task() -> kvm_segment {
    kvm_segment { selector: TASK, type_: 0xb, limit: 0x67, g: 0, ..flat() }
}

/// `segment` as an entry of the descriptor table (Intel SDM volume 3, section 3.4.5).
fn descriptor(segment: kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7);
    let flags = u64::from(segment.l << 1 | segment.db << 2 | segment.g << 3);
    limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

/// What firmware leaves in every processor: external interrupts and NMIs on the local APIC's two pins, MTRRs on with write-back as the
/// default type, fast string operations.
pub fn firmware_state(vcpu: &VcpuFd) -> Result<(), Error> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXTINT: u32 = 7 << 8;
    const NMI: u32 = 4 << 8;
    let mut lapic = vcpu.get_lapic()?;
    for (register, value) in [(LVT_LINT0, EXTINT), (LVT_LINT1, NMI)] {
        for (to, from) in lapic.regs.iter_mut().skip(register).zip(value.to_le_bytes()) {
            *to = from as libc::c_char;
        }
    }
    vcpu.set_lapic(&lapic)?;
    for (index, data) in [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)] {
        let msrs = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]).map_err(|_| Error::new(libc::ENOMEM))?;
        if vcpu.set_msrs(&msrs)? != 1 {
            return Err(Error::new(libc::EINVAL));
        }
    }
    Ok(())
}
