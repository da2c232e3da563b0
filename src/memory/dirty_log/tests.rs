use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::hugetlb::provision::Provision;
use crate::memory::ram::{GRANULE, HOLE_END, HOLE_START};
use crate::memory::{HUGE_PAGE, PAGE_SIZE, PageNumber, thp};

/// A guest that writes the page it is told and says so: `l: in ax, 0x10; mov es, ax; mov es:[0], al; out 0x11, al; jmp l`, in real mode.
const WRITER: [u8; 12] = [0xe5, 0x10, 0x8e, 0xc0, 0x26, 0xa2, 0, 0, 0xe6, 0x11, 0xeb, 0xf4];
const CODE_PAGE: u64 = 1;

struct Guest {
    // Before `vm`, which holds the memory slots.
    vcpu: VcpuFd,
    vm: Arc<VmFd>,
    ram: GuestRam,
}

impl Guest {
    fn new(size: u64) -> Self {
        let ram = GuestRam::allocate(size).unwrap();
        // With pages of 4 KiB a written page is populated alone.
        thp::forbid(&ram).unwrap();
        Self::over(ram)
    }

    fn over(ram: GuestRam) -> Self {
        ram.memory().write_slice(&WRITER, GuestAddress(PageNumber(CODE_PAGE).offset())).unwrap();
        let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
        // Intel without unrestricted guest mode wants it for real mode; others refuse it.
        let _ = vm.set_tss_address(0xfffb_d000);
        for slot in ram.slots() {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: 0,
                guest_phys_addr: slot.start.0,
                memory_size: slot.run.bytes(),
                userspace_addr: ram.host_address(slot.run).unwrap().as_ptr() as u64,
            };
            // SAFETY: `ram` is dropped after the VM.
            unsafe { vm.set_user_memory_region(region).unwrap() };
        }
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        regs.rip = PageNumber(CODE_PAGE).offset();
        regs.rflags = 2;
        vcpu.set_regs(&regs).unwrap();
        Guest { vcpu, vm, ram }
    }

    /// Lets the guest write one byte of `page`, which lies below 1 MiB.
    fn write(&mut self, page: u64) {
        let segment = u16::try_from(page * 256).unwrap();
        match self.vcpu.run().unwrap() {
            VcpuExit::IoIn(0x10, data) => data.copy_from_slice(&segment.to_le_bytes()),
            other => panic!("unexpected exit {other:?}"),
        }
        assert!(matches!(self.vcpu.run().unwrap(), VcpuExit::IoOut(0x11, _)));
    }

    fn start(&self) -> (DirtyLog, PageSet) {
        let mut first = PageSet::empty(self.ram.pages());
        (DirtyLog::start(self.vm.clone(), self.ram.clone(), &mut first).unwrap(), first)
    }

    fn clear_all(&self, log: &mut DirtyLog, pages: &PageSet) {
        log.clear(pages, PageRun::new(0, self.ram.pages())).unwrap();
    }
}

/// The pages of a harvest but for the guest's code: KVM may take mapping a page writable for a write, also when it is only executed.
fn harvest(log: &mut DirtyLog) -> Vec<u64> {
    let mut found = PageSet::empty(log.ram.pages());
    let new = log.harvest(&mut found).unwrap();
    assert_eq!(new, found.len());
    found.runs().flat_map(|run| run.pages().map(|page| page.0)).filter(|page| *page != CODE_PAGE).collect()
}

#[test]
fn first_pass_is_what_the_guest_touched() {
    let mut guest = Guest::new(2 * GRANULE);
    guest.write(40);
    let (log, first) = guest.start();
    assert_eq!(first.runs().collect::<Vec<_>>(), [PageRun::new(CODE_PAGE, 1), PageRun::new(40, 1)]);
    log.stop().unwrap();
}

#[test]
fn every_write_after_the_start_is_found_once() {
    let mut guest = Guest::new(2 * GRANULE);
    guest.write(40);
    let (mut log, first) = guest.start();
    guest.write(40);
    guest.write(100);
    assert_eq!(harvest(&mut log), [100], "touched pages are known to be dirty until they are cleared");
    assert!(harvest(&mut log).is_empty(), "reported once");
    guest.clear_all(&mut log, &first);
    guest.write(40);
    assert_eq!(harvest(&mut log), [40]);
    let mut both = PageSet::empty(guest.ram.pages());
    both.insert(PageRun::new(40, 1));
    both.insert(PageRun::new(100, 1));
    guest.clear_all(&mut log, &both);
    guest.write(41);
    assert_eq!(harvest(&mut log), [41]);
    log.stop().unwrap();
}

#[test]
fn only_the_named_pages_within_the_range_are_cleared() {
    let mut guest = Guest::new(2 * GRANULE);
    let pages = [10, 63, 64, 65, 130];
    pages.iter().for_each(|page| guest.write(*page));
    let (mut log, mut first) = guest.start();
    assert!(pages.iter().all(|page| first.contains(PageNumber(*page))));
    first.remove(PageRun::new(64, 1));
    log.clear(&first, PageRun::new(11, 100)).unwrap();
    pages.iter().for_each(|page| guest.write(*page));
    let again = harvest(&mut log);
    if log.manual_protect {
        assert_eq!(again, [63, 65], "10 and 130 lie outside the range, 64 is not in the set");
    } else {
        assert_eq!(again, pages);
    }
    log.stop().unwrap();
}

#[test]
fn device_writes_are_found_in_both_parts_of_ram() {
    let guest = Guest::new(HOLE_START + GRANULE);
    let (mut log, first) = guest.start();
    guest.clear_all(&mut log, &first);
    let high = HOLE_START / PAGE_SIZE as u64;
    guest.ram.memory().write_obj(1u8, GuestAddress(PageNumber(300).offset())).unwrap();
    guest.ram.memory().write_obj(1u8, GuestAddress(HOLE_END + PAGE_SIZE as u64)).unwrap();
    assert_eq!(harvest(&mut log), [300, high + 1]);
    guest.ram.memory().write_obj(1u8, GuestAddress(PageNumber(300).offset())).unwrap();
    assert_eq!(harvest(&mut log), [300], "reported again although it was not cleared: the bitmap forgot it");
    log.stop().unwrap();
}

/// What is populated at once is still logged page by page.
#[test]
fn hugetlb_memory_is_logged_in_small_pages() {
    let _provision = Provision::new(2);
    let mut guest = Guest::over(GuestRam::allocate_hugetlb(2 * GRANULE).unwrap());
    guest.write(40);
    let (mut log, first) = guest.start();
    assert_eq!(first.runs().collect::<Vec<_>>(), [PageRun::new(0, HUGE_PAGE)]);
    guest.clear_all(&mut log, &first);
    guest.write(41);
    guest.write(200);
    let mut written = PageSet::empty(guest.ram.pages());
    log.harvest(&mut written).unwrap();
    written.remove(PageRun::new(CODE_PAGE, 1));
    assert_eq!(written.runs().collect::<Vec<_>>(), [PageRun::new(41, 1), PageRun::new(200, 1)]);
    guest.clear_all(&mut log, &written);
    guest.write(200);
    guest.ram.memory().write_obj(1u8, GuestAddress(GRANULE + 5)).unwrap();
    assert_eq!(harvest(&mut log), [200, HUGE_PAGE]);
    log.stop().unwrap();
    guest.write(40);
}

#[test]
fn a_second_log_starts_afresh() {
    let mut guest = Guest::new(2 * GRANULE);
    let (mut log, first) = guest.start();
    guest.clear_all(&mut log, &first);
    log.stop().unwrap();
    guest.write(77);
    let (mut log, first) = guest.start();
    assert!(first.contains(PageNumber(77)) && first.contains(PageNumber(CODE_PAGE)));
    guest.clear_all(&mut log, &first);
    guest.write(77);
    assert_eq!(harvest(&mut log), [77]);
}

#[test]
fn without_manual_protect_fetching_clears() {
    let mut guest = Guest::new(2 * GRANULE);
    guest.write(40);
    // Nothing has enabled the capability for this VM yet: its log is the plain one.
    let ram = guest.ram.clone();
    let mut log = DirtyLog { vm: guest.vm.clone(), reported: PageSet::empty(ram.pages()), manual_protect: false, ram };
    log.switch(true).unwrap();
    let mut first = PageSet::empty(guest.ram.pages());
    log.collect_populated(&mut first).unwrap();
    assert_eq!(first.runs().collect::<Vec<_>>(), [PageRun::new(CODE_PAGE, 1), PageRun::new(40, 1)]);
    guest.write(50);
    assert_eq!(harvest(&mut log), [50]);
    assert!(harvest(&mut log).is_empty());
    guest.clear_all(&mut log, &first);
    guest.write(50);
    assert_eq!(harvest(&mut log), [50]);
}

#[test]
fn masks_cut_the_run_out_of_a_word() {
    assert_eq!(mask_of_word(PageRun::new(0, 128), 1), !0);
    assert_eq!(mask_of_word(PageRun::new(66, 2), 1), 0b1100);
    assert_eq!(mask_of_word(PageRun::new(66, 2), 0), 0);
    assert_eq!(mask_of_word(PageRun::new(63, 2), 0), 1 << 63);
    assert_eq!(mask_of_word(PageRun::new(63, 2), 1), 1);
}
