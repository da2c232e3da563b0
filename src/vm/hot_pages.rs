//! What a guest touches first when it goes on: by its registers, and where these point to. It need not be complete or right; in postcopy what is
//! named here need not be waited for.

use std::collections::BTreeSet;

use vm_memory::{Bytes, GuestAddress};

use super::state::{MachineState, VcpuState};
use crate::memory::ram::GuestMemory;

const PAGE: u64 = 4096;
/// So much of a stack, from its top on, is looked through for addresses: of code to return to, and of what that works on.
const STACK: u64 = 512;
/// Code goes on in these many pages around the one it is in, aligned.
const CODE: u64 = 8 * PAGE;
/// CR0.PG, CR4.LA57 and EFER.LMA (Intel SDM, volume 3A, chapter 2).
const PAGING: u64 = 1 << 31;
const LA57: u64 = 1 << 12;
const LONG_MODE: u64 = 1 << 10;
/// Of an entry of a page table: present, and the last one of a walk (volume 3A, section 4.5).
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Offsets in the local APIC's registers: the timer's entry of the local vector table.
const LVT_TIMER: usize = 0x320;
/// MSRs that name memory: those that KVM writes to (kernel document virt/kvm/x86/msr), all of which have flags in their low bits.
const KVM_MSRS: [u32; 5] = [0x4b56_4d00, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04];
/// MSRs that hold linear addresses: LSTAR and KERNEL_GS_BASE.
const LINEAR_MSRS: [u32; 2] = [0xc000_0082, 0xc000_0102];

/// The first bytes of the pages that are likely to be touched first, at most `most`.
pub fn hot_pages(state: &MachineState, memory: &GuestMemory, most: usize) -> Vec<GuestAddress> {
    let mut found = Found { memory, most, seen: BTreeSet::new(), pages: Vec::new() };
    state.vcpus.iter().for_each(|vcpu| found.vcpu(vcpu));
    found.pages
}

struct Found<'a> {
    memory: &'a GuestMemory,
    most: usize,
    seen: BTreeSet<u64>,
    pages: Vec<GuestAddress>,
}

impl Found<'_> {
    fn vcpu(&mut self, vcpu: &VcpuState) {
        let (regs, sregs) = (&vcpu.regs.0, &vcpu.sregs.0);
        let msr = |index: u32| vcpu.msrs.iter().find(|msr| msr.index == index).map_or(0, |msr| msr.value);
        for address in KVM_MSRS.map(msr).into_iter().filter(|address| *address != 0) {
            self.physical(address);
        }
        let paging = Paging::of(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer);
        let timer = vcpu.lapic.0.regs.get(LVT_TIMER).map_or(0, |vector| u64::from(*vector as u8));
        let gate = sregs.idt.base.wrapping_add(16 * timer);
        // The stack that an interrupt from ring 3 takes.
        let interrupt_stack = self.word(paging, sregs.tr.base.wrapping_add(4));
        let handler = match (self.word(paging, gate), self.word(paging, gate.wrapping_add(8))) {
            // An interrupt gate's offset in its three parts.
            (Some(low), Some(high)) => Some(low & 0xffff | low >> 32 & 0xffff_0000 | high << 32),
            _ => None,
        };
        for code in [Some(regs.rip), handler].into_iter().flatten() {
            self.linear(paging, code);
            for offset in (0..CODE).step_by(PAGE as usize) {
                self.linear(paging, code / CODE * CODE + offset);
            }
        }
        let stacks = [Some(regs.rsp), interrupt_stack].into_iter().flatten();
        stacks.for_each(|stack| [stack.wrapping_sub(8), stack].into_iter().for_each(|address| self.linear(paging, address)));
        // Where the local APIC is mapped one to one, the tables on the way to it: a timer's interrupt is acknowledged there.
        self.linear(paging, sregs.apic_base & ADDRESS);
        for address in [gate, sregs.gdt.base, sregs.tr.base, sregs.gs.base, sregs.fs.base, msr(LINEAR_MSRS[0]), msr(LINEAR_MSRS[1])] {
            self.linear(paging, address);
        }
        // What may be no address at all, and no table is taken along for.
        let registers = [regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.r8, regs.r9, regs.r10, regs.r11];
        let registers = registers.into_iter().chain([regs.r12, regs.r13, regs.r14, regs.r15]);
        let stack = (0..STACK).step_by(8).filter_map(|offset| self.peek(paging, regs.rsp.wrapping_add(offset)));
        for address in registers.chain(stack.collect::<Vec<_>>()).filter(|address| *address >= PAGE) {
            let (_, page) = self.walk(paging, address);
            page.into_iter().for_each(|page| self.physical(page));
        }
    }

    fn physical(&mut self, address: u64) {
        let page = address & ADDRESS;
        if self.pages.len() < self.most && self.seen.insert(page) {
            self.pages.push(GuestAddress(page));
        }
    }

    /// The page behind a linear address, and the tables on the way.
    fn linear(&mut self, paging: Option<Paging>, address: u64) {
        let (tables, page) = self.walk(paging, address);
        tables.into_iter().chain(page).for_each(|page| self.physical(page));
    }

    /// The word there, for which only the tables are touched.
    fn word(&mut self, paging: Option<Paging>, address: u64) -> Option<u64> {
        let (tables, _) = self.walk(paging, address);
        tables.into_iter().for_each(|table| self.physical(table));
        self.peek(paging, address)
    }

    /// The word there, which only this looks at.
    fn peek(&self, paging: Option<Paging>, address: u64) -> Option<u64> {
        let (_, physical) = self.walk(paging, address);
        self.memory.read_obj(GuestAddress(physical?)).ok()
    }

    /// The tables on the way to a linear address, and what it stands for if all are there.
    fn walk(&self, paging: Option<Paging>, address: u64) -> (Vec<u64>, Option<u64>) {
        let mut tables = Vec::new();
        let Some(Paging { root, levels }) = paging else { return (tables, Some(address)) };
        let mut table = root;
        for level in (0..levels).rev() {
            tables.push(table);
            let shift = 12 + 9 * level;
            let Ok(entry) = self.memory.read_obj::<u64>(GuestAddress(table + (address >> shift & 511) * 8)) else { break };
            if entry & PRESENT == 0 {
                break;
            }
            if level == 0 || entry & LARGE != 0 {
                let offset = (1 << shift) - 1;
                return (tables, Some(entry & ADDRESS & !offset | address & offset));
            }
            table = entry & ADDRESS;
        }
        (tables, None)
    }
}

/// How long mode translates addresses.
#[derive(Clone, Copy)]
struct Paging {
    root: u64,
    levels: u32,
}

impl Paging {
    /// Nothing where linear addresses are physical ones, or are translated in an older way, which no guest stays in.
    fn of(cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Option<Self> {
        let levels = if cr4 & LA57 == 0 { 4 } else { 5 };
        (cr0 & PAGING != 0 && efer & LONG_MODE != 0).then_some(Paging { root: cr3 & ADDRESS, levels })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;

    const HIGH: u64 = 0xffff_8000_0000_0000;

    /// Tables at 0x1000 to 0x4000 that map `HIGH` to 0x9000 and 2 MiB after it to a large page at 0x20_0000.
    fn ram() -> GuestRam {
        let ram = GuestRam::allocate(4 << 20).unwrap();
        let entry = |table: u64, index: u64, value: u64| ram.memory().write_obj(value | PRESENT, GuestAddress(table + index * 8)).unwrap();
        entry(0x1000, 256, 0x2000);
        entry(0x2000, 0, 0x3000);
        entry(0x3000, 0, 0x4000);
        entry(0x3000, 1, 0x20_0000 | LARGE);
        entry(0x4000, 0, 0x9000);
        ram
    }

    fn found(ram: &GuestRam, most: usize) -> Found<'_> {
        Found { memory: ram.memory(), most, seen: BTreeSet::new(), pages: Vec::new() }
    }

    #[test]
    fn a_walk_names_its_tables_and_its_page() {
        let ram = ram();
        let paging = Paging::of(PAGING, 0x1000, 0, LONG_MODE);
        let mut walk = found(&ram, 9);
        walk.linear(paging, HIGH + 8);
        walk.linear(paging, HIGH + (2 << 20) + 0x3456);
        let pages: Vec<_> = walk.pages.iter().map(|page| page.0).collect();
        assert_eq!(pages, [0x1000, 0x2000, 0x3000, 0x4000, 0x9000, 0x20_3000]);
        // Not present, not mapped, and tables beyond memory.
        walk.linear(paging, HIGH + PAGE);
        walk.linear(paging, 0);
        walk.linear(Paging::of(PAGING, 1 << 40, 0, LONG_MODE), HIGH);
        assert_eq!(walk.pages.len(), 7, "{:?}", walk.pages);
    }

    #[test]
    fn what_registers_and_the_stack_name_is_found() {
        let ram = ram();
        ram.memory().write_obj(HIGH + (2 << 20) + 0x5008, GuestAddress(0x9000 + 0x100)).unwrap();
        let mut vcpu = VcpuState::default();
        (vcpu.sregs.0.cr0, vcpu.sregs.0.cr3, vcpu.sregs.0.efer) = (PAGING, 0x1000, LONG_MODE);
        (vcpu.regs.0.rsp, vcpu.regs.0.rbx) = (HIGH + 0x80, HIGH + (2 << 20) + 0x7000);
        let mut walk = found(&ram, 64);
        walk.vcpu(&vcpu);
        for page in [0x9000, 0x20_5000, 0x20_7000] {
            assert!(walk.pages.contains(&GuestAddress(page)), "{page:#x} is not among {:?}", walk.pages);
        }
    }

    #[test]
    fn no_more_than_asked_for() {
        let ram = ram();
        let mut walk = found(&ram, 2);
        walk.linear(Paging::of(PAGING, 0x1000, 0, LONG_MODE), HIGH);
        assert_eq!(walk.pages.len(), 2);
        let mut real = found(&ram, 2);
        real.linear(Paging::of(0, 0x1000, 0, 0), 0xfff0);
        assert_eq!(real.pages, [GuestAddress(0xf000)]);
    }
}
