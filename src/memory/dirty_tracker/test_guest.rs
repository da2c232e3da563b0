//! A guest of a few instructions that writes the pages it is told, for the tests of both trackers.

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{PageNumber, thp};

/// Increments the first number of so many pages from an address on, and says so; in 64-bit mode and ring 3, which runs natively on every
/// KVM: `l: in eax, 0x12; mov ecx, eax; in eax, 0x10; m: inc dword [rax]; add eax, 4096; dec ecx; jnz m; out 0x11, al; jmp l`.
const WRITER: [u8; 21] = [0xe5, 0x12, 0x89, 0xc1, 0xe5, 0x10, 0xff, 0, 5, 0, 0x10, 0, 0, 0xff, 0xc9, 0x75, 0xf5, 0xe6, 0x11, 0xeb, 0xeb];
const CODE_PAGE: u64 = 1;
/// Three levels of page tables that show the first GiB as it is.
const TABLES: u64 = 2;
/// The pages that hold the guest itself.
pub const SYSTEM: PageRun = PageRun::new(CODE_PAGE, 4);

/// The means by which a guest is tracked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Means {
    Log,
    /// With rings of the usual size.
    Ring,
    /// With the smallest rings that KVM takes.
    SmallRing,
}

/// All of them.
pub const MEANS: [Means; 3] = [Means::Log, Means::Ring, Means::SmallRing];

pub struct Guest {
    // Before `ram`, which the memory slots show.
    pub vcpus: Vec<Writer>,
    pub tracking: Tracking,
    pub ram: GuestRam,
}

/// A vCPU.
pub struct Writer {
    fd: VcpuFd,
    tracking: Tracking,
    /// How often its ring was full.
    pub full: u64,
}

impl Guest {
    /// A guest of two vCPUs.
    pub fn new(size: u64, means: Means) -> Self {
        let ram = GuestRam::allocate(size).unwrap();
        // With pages of 4 KiB a written page is populated alone.
        thp::forbid(&ram).unwrap();
        Self::over(ram, means)
    }

    /// Such a guest in `ram`.
    pub fn over(ram: GuestRam, means: Means) -> Self {
        ram.memory().write_slice(&WRITER, GuestAddress(PageNumber(CODE_PAGE).offset())).unwrap();
        // Present, writable, for ring 3, and both accessed and dirty, so that the processor has no reason to write to the tables.
        for level in 0..2 {
            let entry = PageNumber(TABLES + level + 1).offset() | 0x67;
            ram.memory().write_obj(entry, GuestAddress(PageNumber(TABLES + level).offset())).unwrap();
        }
        for large in 0..512 {
            let entry = large << 21 | 0xe7;
            ram.memory().write_obj(entry, GuestAddress(PageNumber(TABLES + 2).offset() + large * 8)).unwrap();
        }
        let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
        switch(&vm, &ram, false).unwrap();
        let tracking = match means {
            Means::Log => Tracking::new(TrackerChoice::Log, &vm, &ram, false).unwrap(),
            Means::Ring => Tracking::new(TrackerChoice::Ring, &vm, &ram, false).unwrap(),
            Means::SmallRing => {
                // KVM keeps entries for what comes between full and out of the guest, more of them on some processors.
                let mut sizes = (8..16).map(|power| DirtyRings::enable(vm.clone(), ram.clone(), 1 << power));
                Tracking::Ring(Arc::new(sizes.find_map(Result::ok).unwrap()))
            }
        };
        let vcpus = (0..2).map(|id| Writer::new(vm.create_vcpu(id).unwrap(), &tracking)).collect();
        Guest { vcpus, tracking, ram }
    }

    /// Lets the first vCPU write a page.
    pub fn write(&mut self, page: u64) {
        self.vcpus[0].write(PageRun::new(page, 1));
    }

    pub fn start(&self) -> (DirtyTracker, PageSet) {
        let mut first = PageSet::empty(self.ram.pages());
        (self.tracking.start(&self.ram, &mut first).unwrap(), first)
    }

    pub fn clear_all(&self, tracker: &mut DirtyTracker, pages: &PageSet) {
        tracker.clear(pages, PageRun::new(0, self.ram.pages())).unwrap();
    }

    /// The pages of a harvest.
    pub fn harvest(&self, tracker: &mut DirtyTracker) -> Vec<u64> {
        let mut found = PageSet::empty(self.ram.pages());
        let new = tracker.harvest(&mut found).unwrap();
        assert_eq!(new, found.len());
        without_system(&found)
    }
}

/// The pages but for the guest itself: KVM may take mapping a page writable for a write, also when it is only executed.
pub fn without_system(pages: &PageSet) -> Vec<u64> {
    let mut pages = pages.clone();
    pages.remove(SYSTEM);
    pages.runs().flat_map(|run| run.pages().map(|page| page.0)).collect()
}

impl Writer {
    fn new(fd: VcpuFd, tracking: &Tracking) -> Self {
        tracking.add_vcpu(&fd).unwrap();
        let mut sregs = fd.get_sregs().unwrap();
        // Protection and paging; PAE; long mode, enabled and active.
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0031, PageNumber(TABLES).offset(), 1 << 5, 0x500);
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            *segment = kvm_segment { limit: !0, selector: 0x2b, type_: 3, present: 1, dpl: 3, db: 1, s: 1, g: 1, ..*segment };
        }
        sregs.cs = kvm_segment { selector: 0x33, type_: 11, db: 0, l: 1, base: 0, ..sregs.ss };
        fd.set_sregs(&sregs).unwrap();
        let mut regs = fd.get_regs().unwrap();
        (regs.rip, regs.rflags) = (PageNumber(CODE_PAGE).offset(), 0x3002);
        fd.set_regs(&regs).unwrap();
        Writer { fd, tracking: tracking.clone(), full: 0 }
    }

    /// Lets the guest write all pages of `run`, which lies below 1 GiB.
    pub fn write(&mut self, run: PageRun) {
        let (first, count) = (u32::try_from(run.first.offset()).unwrap(), u32::try_from(run.count).unwrap());
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoIn(0x12, data)) => data.copy_from_slice(&count.to_le_bytes()),
                Ok(VcpuExit::IoIn(0x10, data)) => data.copy_from_slice(&first.to_le_bytes()),
                Ok(VcpuExit::IoOut(0x11, _)) => break,
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    let Tracking::Ring(rings) = &self.tracking else { panic!("there is no ring") };
                    rings.collect().unwrap();
                    self.full += 1;
                }
                Ok(exit) => panic!("unexpected exit {exit:?}"),
                Err(error) => assert_eq!(error.errno(), libc::EINTR),
            }
        }
        // What the last instruction did is complete only now (KVM API, KVM_RUN).
        self.fd.set_kvm_immediate_exit(1);
        assert_eq!(self.fd.run().unwrap_err().errno(), libc::EINTR);
        self.fd.set_kvm_immediate_exit(0);
    }
}
