//! What must hold for every tracker.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::test_guest::{Guest, MEANS, Means, SYSTEM, Writer, without_system};
use super::*;
use crate::memory::hugetlb::provision::Provision;
use crate::memory::ram::{GRANULE, HOLE_END, HOLE_START};
use crate::memory::{HUGE_PAGE, PAGE_SIZE, PageNumber};

#[test]
fn first_pass_is_what_the_guest_touched() {
    for means in MEANS {
        let mut guest = Guest::new(2 * GRANULE, means);
        guest.write(40);
        let (tracker, first) = guest.start();
        assert_eq!(first.runs().collect::<Vec<_>>(), [SYSTEM, PageRun::new(40, 1)], "{means:?}");
        tracker.stop().unwrap();
    }
}

#[test]
fn every_write_to_a_clear_page_is_found() {
    for means in MEANS {
        let mut guest = Guest::new(2 * GRANULE, means);
        guest.write(40);
        let (mut tracker, first) = guest.start();
        guest.clear_all(&mut tracker, &first);
        assert!(guest.harvest(&mut tracker).is_empty(), "{means:?}");
        guest.write(40);
        guest.vcpus[1].write(PageRun::new(100, 1));
        assert_eq!(guest.harvest(&mut tracker), [40, 100], "{means:?}");
        assert!(guest.harvest(&mut tracker).is_empty(), "{means:?}: reported once");
        let mut both = PageSet::empty(guest.ram.pages());
        both.insert(PageRun::new(40, 1));
        both.insert(PageRun::new(100, 1));
        guest.clear_all(&mut tracker, &both);
        guest.vcpus[1].write(PageRun::new(40, 2));
        assert_eq!(guest.harvest(&mut tracker), [40, 41], "{means:?}");
        tracker.stop().unwrap();
    }
}

#[test]
fn a_page_that_is_cleared_before_it_is_read_is_not_reported() {
    for means in MEANS {
        let mut guest = Guest::new(2 * GRANULE, means);
        [40, 50, 600].into_iter().for_each(|page| guest.write(page));
        let (mut tracker, mut first) = guest.start();
        [40, 50, 600].into_iter().for_each(|page| guest.write(page));
        first.remove(PageRun::new(50, 1));
        tracker.clear(&first, PageRun::new(0, 512)).unwrap();
        // All are in the first pass, as the log sees it, and have been reported; the ring tells of the writes since.
        let reported = if means == Means::Log { vec![] } else { vec![50, 600] };
        assert_eq!(guest.harvest(&mut tracker), reported, "{means:?}: 50 is not in the set, 600 not in the range");
        guest.write(40);
        assert_eq!(guest.harvest(&mut tracker), [40], "{means:?}");
    }
}

#[test]
fn device_writes_are_found_in_both_parts_of_ram() {
    for means in MEANS {
        let guest = Guest::new(HOLE_START + GRANULE, means);
        let (mut tracker, first) = guest.start();
        guest.clear_all(&mut tracker, &first);
        let high = HOLE_START / PAGE_SIZE as u64;
        guest.ram.memory().write_obj(1u8, GuestAddress(PageNumber(300).offset())).unwrap();
        guest.ram.memory().write_obj(1u8, GuestAddress(HOLE_END + PAGE_SIZE as u64)).unwrap();
        assert_eq!(guest.harvest(&mut tracker), [300, high + 1], "{means:?}");
        guest.ram.memory().write_obj(1u8, GuestAddress(PageNumber(300).offset())).unwrap();
        assert_eq!(guest.harvest(&mut tracker), [300], "{means:?}: reported again although it was not cleared: the bitmap forgot it");
        tracker.stop().unwrap();
    }
}

#[test]
fn a_second_tracker_starts_afresh() {
    for means in MEANS {
        let mut guest = Guest::new(8 * GRANULE, means);
        let (mut tracker, first) = guest.start();
        guest.clear_all(&mut tracker, &first);
        guest.write(78);
        tracker.stop().unwrap();
        guest.write(77);
        // More than any small ring holds.
        guest.vcpus[1].write(PageRun::new(1024, 3000));
        assert_eq!(guest.vcpus[1].full, 0, "{means:?}: nobody tracks");
        let (mut tracker, first) = guest.start();
        assert_eq!(without_system(&first), [77, 78].into_iter().chain(1024..4024).collect::<Vec<_>>(), "{means:?}");
        guest.clear_all(&mut tracker, &first);
        guest.write(77);
        assert_eq!(guest.harvest(&mut tracker), [77], "{means:?}");
    }
}

#[test]
fn the_log_is_the_choice_where_kvm_has_manual_protect() {
    let is_ring = |choice| {
        let vm = Arc::new(kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap());
        matches!(Tracking::new(choice, &vm, &GuestRam::allocate(GRANULE).unwrap(), false).unwrap(), Tracking::Ring(_))
    };
    assert!(is_ring(TrackerChoice::Ring) && !is_ring(TrackerChoice::Log));
    let manual_protect = kvm_ioctls::Kvm::new().unwrap().check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) > 0;
    assert!(!is_ring(TrackerChoice::Auto) || !manual_protect);
}

/// Pages that the guest of the next test writes, most of them for the first time while they are tracked.
const PAGES: u64 = 16384;

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A thread on which the vCPU writes runs of pages, and counts them, until it is told to end.
fn storm(mut vcpu: Writer, mut random: u64, end: &Arc<AtomicBool>, count: &Arc<AtomicU64>) -> JoinHandle<Writer> {
    let (end, written) = (end.clone(), count.clone());
    std::thread::spawn(move || {
        while !end.load(Ordering::Acquire) {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (first, count) = (512 + (random >> 33) % (PAGES - 512), 1 + (random >> 50) % 300);
            vcpu.write(PageRun::new(first, count.min(PAGES - first)));
            written.fetch_add(1, Ordering::Release);
        }
        vcpu
    })
}

/// Copies RAM as a migration does while two vCPUs write it as fast as they can and are interrupted all the time: at the end the copy must
/// be the same.
#[test]
fn no_write_is_ever_lost() {
    register_signal_handler(SIGRTMIN() + 1, nothing).unwrap();
    for means in MEANS {
        let mut guest = Guest::new(PAGES * PAGE_SIZE as u64, means);
        let copy = GuestRam::allocate(guest.ram.size()).unwrap();
        let copy_run = |run: PageRun| {
            let (from, to) = (guest.ram.host_address(run).unwrap(), copy.host_address(run).unwrap());
            // SAFETY: the same part of two mappings; a page that is torn because the guest writes it is copied again, if the tracker is right.
            unsafe { from.copy_to_nonoverlapping(to, run.bytes() as usize) };
        };
        let end = Arc::new(AtomicBool::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let storms: Vec<_> = (1..).zip(guest.vcpus.drain(..)).map(|(seed, vcpu)| storm(vcpu, seed, &end, &written)).collect();
        let mut found = 0;
        let mut session = || {
            let mut owed = PageSet::empty(PAGES);
            let mut tracker = guest.tracking.start(&guest.ram, &mut owed).unwrap();
            for _ in 0..15 {
                for range in (0..PAGES).step_by(1024).map(|first| PageRun::new(first, 1024)) {
                    tracker.clear(&owed, range).unwrap();
                    owed.runs_within(range).for_each(copy_run);
                }
                let enough = written.load(Ordering::Acquire) + 10;
                while written.load(Ordering::Acquire) < enough {
                    storms.iter().for_each(|storm| storm.kill(SIGRTMIN() + 1).unwrap());
                    std::thread::yield_now();
                }
                owed = PageSet::empty(PAGES);
                found += tracker.harvest(&mut owed).unwrap();
            }
            (tracker, owed)
        };
        // Given up without the rest: the next one must not miss it.
        session().0.stop().unwrap();
        let (mut tracker, mut owed) = session();
        end.store(true, Ordering::Release);
        let vcpus: Vec<_> = storms.into_iter().map(|storm| storm.join().unwrap()).collect();
        tracker.harvest(&mut owed).unwrap();
        owed.runs().for_each(copy_run);
        for page in (0..PAGES).map(|page| PageRun::new(page, 1)) {
            // SAFETY: aligned, mapped, and nobody writes any more.
            let [there, here] =
                [&guest.ram, &copy].map(|ram| unsafe { ram.host_address(page).unwrap().cast::<u32>().as_ptr().read_volatile() });
            assert_eq!(here, there, "{means:?}: {page}");
        }
        assert!(found > PAGES, "{means:?}: nothing happened");
        assert!(means != Means::SmallRing || vcpus.iter().all(|vcpu| vcpu.full > 0), "the rings were never full");
    }
}

/// What is populated at once is still tracked page by page.
#[test]
fn hugetlb_memory_is_tracked_in_small_pages() {
    for means in MEANS {
        let _provision = Provision::new(2);
        let mut guest = Guest::over(GuestRam::allocate_hugetlb(2 * GRANULE).unwrap(), means);
        guest.write(40);
        let (mut tracker, first) = guest.start();
        assert_eq!(first.runs().collect::<Vec<_>>(), [PageRun::new(0, HUGE_PAGE)], "{means:?}");
        guest.clear_all(&mut tracker, &first);
        guest.write(41);
        guest.write(200);
        assert_eq!(guest.harvest(&mut tracker), [41, 200], "{means:?}");
        tracker.stop().unwrap();
    }
}
