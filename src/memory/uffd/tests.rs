use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::memory::hugetlb::provision::Provision;
use crate::memory::ram::GRANULE;
use crate::memory::{HUGE_PAGE, PageSet, populated};

fn missing(granules: u64) -> (GuestRam, MissingPages, EventFd) {
    let ram = GuestRam::allocate(granules * GRANULE).unwrap();
    let pages = Userfaultfd::open().unwrap().register(ram.clone()).unwrap();
    (ram, pages, EventFd::new(EFD_NONBLOCK).unwrap())
}

/// The first byte of `page`; waits where the page is missing.
fn read(ram: &GuestRam, page: u64) -> u8 {
    // SAFETY: the page is mapped; only the kernel writes it, before this returns.
    unsafe { ram.host_address(PageRun::new(page, 1)).unwrap().read_volatile() }
}

fn stop(event: &EventFd) -> rustix::fd::BorrowedFd<'_> {
    // SAFETY: the descriptor lives as long as `event`.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn contents(run: PageRun) -> Vec<u8> {
    run.pages().flat_map(|page| [page.0 as u8 ^ 0x5a; PAGE_SIZE]).collect()
}

/// Serves every fault by one page of `contents` until stopped; returns how many faults there were.
fn serve(pages: &MissingPages, event: &EventFd) -> u64 {
    let mut faults = 0;
    while let Some(Fault { page, .. }) = pages.next_fault(stop(event)).unwrap() {
        let run = PageRun::single(page);
        pages.place(run, &contents(run)).unwrap();
        faults += 1;
    }
    faults
}

#[test]
fn a_toucher_waits_for_its_page() {
    let (ram, pages, event) = missing(1);
    thread::scope(|scope| {
        let toucher = scope.spawn(|| [read(&ram, 7), read(&ram, 300)]);
        assert_eq!(pages.next_fault(stop(&event)).unwrap().map(|fault| fault.page), Some(PageNumber(7)));
        assert_eq!(pages.place(PageRun::new(7, 1), &contents(PageRun::new(7, 1))).unwrap(), 1);
        assert_eq!(pages.next_fault(stop(&event)).unwrap().map(|fault| fault.page), Some(PageNumber(300)));
        assert_eq!(pages.place_zero(PageRun::new(300, 1)).unwrap(), 1);
        assert_eq!(toucher.join().unwrap(), [7 ^ 0x5a, 0]);
    });
}

#[test]
fn a_run_is_placed_across_mappings_that_stay_apart() {
    let ram = GuestRam::allocate(2 * GRANULE).unwrap();
    thp::allow_only(&ram, &[PageRun::new(HUGE_PAGE, HUGE_PAGE)]);
    // Each has been touched under its own advice, and is not joined to the other by the same one.
    for page in [0, 2 * HUGE_PAGE - 1] {
        // SAFETY: the page is mapped, and nobody else uses it.
        unsafe { ram.host_address(PageRun::new(page, 1)).unwrap().write_volatile(1) };
    }
    let pages = Userfaultfd::open().unwrap().register(ram.clone()).unwrap();
    let (across, zeros) = (PageRun::new(HUGE_PAGE - 4, 8), PageRun::new(HUGE_PAGE - 8, 16));
    for run in [across, zeros] {
        pages.discard(run).unwrap();
    }
    assert_eq!(pages.place(across, &contents(across)).unwrap(), 8);
    assert_eq!(pages.place_zero(zeros).unwrap(), 8);
    let expected: Vec<u8> = zeros.pages().map(|page| if across.pages().any(|of| of == page) { page.0 as u8 ^ 0x5a } else { 0 }).collect();
    assert_eq!(zeros.pages().map(|page| read(&ram, page.0)).collect::<Vec<_>>(), expected);
}

#[test]
fn a_fault_names_its_thread() {
    let (ram, pages, event) = missing(1);
    thread::scope(|scope| {
        let toucher = scope.spawn(|| (rustix::thread::gettid(), read(&ram, 7)));
        let fault = pages.next_fault(stop(&event)).unwrap().unwrap();
        pages.place_zero(PageRun::new(7, 1)).unwrap();
        assert_eq!(fault.thread, Some(toucher.join().unwrap().0));
    });
}

#[test]
fn stop_ends_the_wait() {
    let (_ram, pages, event) = missing(1);
    thread::scope(|scope| {
        let waiter = scope.spawn(|| pages.next_fault(stop(&event)).unwrap());
        event.write(1).unwrap();
        assert_eq!(waiter.join().unwrap(), None);
    });
}

#[test]
fn kernel_accesses_wait_as_well() {
    let (ram, pages, event) = missing(1);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    rustix::io::write(&writer, b"disk").unwrap();
    thread::scope(|scope| {
        let server = scope.spawn(|| serve(&pages, &event));
        let target = ram.host_address(PageRun::new(20, 1)).unwrap();
        // SAFETY: the page is mapped and big enough, and nothing else uses it.
        let read_bytes = unsafe { libc::read(reader.as_raw_fd(), target.as_ptr().cast(), 4) };
        assert_eq!(read_bytes, 4);
        event.write(1).unwrap();
        assert!(server.join().unwrap() >= 1);
    });
    assert_eq!(read(&ram, 20), b'd', "the kernel's write came after the placing");
    // SAFETY: as above.
    assert_eq!(unsafe { ram.host_address(PageRun::new(20, 1)).unwrap().add(4).read_volatile() }, 20 ^ 0x5a);
}

#[test]
fn runs_skip_pages_that_are_there() {
    let (ram, pages, _event) = missing(1);
    assert_eq!(pages.place_zero(PageRun::new(3, 2)).unwrap(), 2);
    assert_eq!(pages.place(PageRun::new(9, 1), &[1; PAGE_SIZE]).unwrap(), 1);
    let run = PageRun::new(0, 10);
    assert_eq!(pages.place(run, &contents(run)).unwrap(), 7);
    assert_eq!((0..10).map(|page| read(&ram, page)).collect::<Vec<_>>(), [0x5a, 0x5b, 0x58, 0, 0, 0x5f, 0x5c, 0x5d, 0x52, 1]);
    assert_eq!(pages.place_zero(PageRun::new(5, 10)).unwrap(), 5);
    assert_eq!(pages.place(run, &contents(run)).unwrap(), 0);
}

#[test]
fn discarded_pages_are_missing_again() {
    let ram = GuestRam::allocate(2 * GRANULE).unwrap();
    // Precopy: a huge page, where there are any.
    // SAFETY: the range is mapped and nobody else uses it.
    unsafe { ram.base().write_bytes(1, 2 * GRANULE as usize) };
    let pages = Userfaultfd::open().unwrap().register(ram.clone()).unwrap();
    pages.discard(PageRun::new(5, 3)).unwrap();
    let run = PageRun::new(4, 5);
    assert_eq!(pages.place(run, &contents(run)).unwrap(), 3);
    assert_eq!((4..9).map(|page| read(&ram, page)).collect::<Vec<_>>(), [1, 0x5f, 0x5c, 0x5d, 1]);
}

/// All threads touch all pages while runs are placed from several threads: everybody gets everything, once.
#[test]
fn many_threads_race_for_the_same_pages() {
    let (ram, pages, event) = missing(4);
    let placed = AtomicU64::new(0);
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            while let Some(Fault { page, .. }) = pages.next_fault(stop(&event)).unwrap() {
                let run = PageRun::single(page);
                placed.fetch_add(pages.place(run, &contents(run)).unwrap(), Ordering::Relaxed);
            }
        });
        let background: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    for first in (0..ram.pages()).step_by(32) {
                        let run = PageRun::new(first, 32);
                        placed.fetch_add(pages.place(run, &contents(run)).unwrap(), Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let touchers: Vec<_> = (0..4)
            .map(|thread| {
                let ram = &ram;
                scope.spawn(move || {
                    for index in 0..ram.pages() {
                        // Each in an order of its own; the factors are odd, so every page comes up.
                        let page = index * (2 * thread + 1) % ram.pages();
                        assert_eq!(read(ram, page), page as u8 ^ 0x5a);
                    }
                })
            })
            .collect();
        background.into_iter().chain(touchers).for_each(|thread| thread.join().unwrap());
        event.write(1).unwrap();
        server.join().unwrap();
    });
    assert_eq!(placed.into_inner(), ram.pages());
    pages.unregister().unwrap();
}

#[test]
fn runs_from_outside_are_checked() {
    let (ram, pages, _event) = missing(1);
    for run in [PageRun::new(ram.pages(), 1), PageRun::new(0, 0), PageRun::new(u64::MAX, 2), PageRun::new(ram.pages() - 1, 2)] {
        assert!(matches!(pages.place_zero(run), Err(UffdError::BadRun(_))), "{run}");
        assert!(matches!(pages.discard(run), Err(UffdError::BadRun(_))), "{run}");
        assert!(matches!(pages.wake(run), Err(UffdError::BadRun(_))), "{run}");
    }
    assert!(matches!(pages.place(PageRun::new(0, 2), &[0; PAGE_SIZE]), Err(UffdError::BadRun(_))));
    pages.unregister().unwrap();
    match pages.place_zero(PageRun::new(0, 1)) {
        Err(UffdError::Place { source, .. }) => assert_eq!(source.raw_os_error(), Some(libc::ENOENT)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_system_call_gives_one_too() {
    let ram = GuestRam::allocate(GRANULE).unwrap();
    let pages = Userfaultfd::from_system_call().unwrap().register(ram).unwrap();
    assert_eq!(pages.place_zero(PageRun::new(0, 2)).unwrap(), 2);
}

fn missing_hugetlb(granules: u64) -> (Provision, GuestRam, MissingPages, EventFd) {
    let provision = Provision::new(granules);
    let ram = GuestRam::allocate_hugetlb(granules * GRANULE).unwrap();
    let pages = Userfaultfd::open().unwrap().register(ram.clone()).unwrap();
    (provision, ram, pages, EventFd::new(EFD_NONBLOCK).unwrap())
}

fn huge(number: u64) -> PageRun {
    PageRun::new(number * HUGE_PAGE, HUGE_PAGE)
}

#[test]
fn a_toucher_of_hugetlb_memory_waits_for_the_huge_page() {
    let (_provision, ram, pages, event) = missing_hugetlb(2);
    thread::scope(|scope| {
        let toucher = scope.spawn(|| [read(&ram, 7), read(&ram, HUGE_PAGE + 300)]);
        assert_eq!(pages.next_fault(stop(&event)).unwrap().map(|fault| fault.page), Some(PageNumber(0)));
        assert_eq!(pages.place(huge(0), &contents(huge(0))).unwrap(), HUGE_PAGE);
        assert_eq!(pages.next_fault(stop(&event)).unwrap().map(|fault| fault.page), Some(PageNumber(HUGE_PAGE)));
        assert_eq!(pages.place_zero(huge(1)).unwrap(), HUGE_PAGE);
        assert_eq!(toucher.join().unwrap(), [7 ^ 0x5a, 0]);
    });
    assert_eq!(read(&ram, 511), 511_u64 as u8 ^ 0x5a);
}

#[test]
fn runs_of_huge_pages_skip_those_that_are_there() {
    let (_provision, ram, pages, _event) = missing_hugetlb(6);
    assert_eq!(pages.place_zero(PageRun::new(HUGE_PAGE, 2 * HUGE_PAGE)).unwrap(), 2 * HUGE_PAGE);
    assert_eq!(pages.place(huge(4), &vec![1; GRANULE as usize]).unwrap(), HUGE_PAGE);
    let all = PageRun::new(0, 5 * HUGE_PAGE);
    assert_eq!(pages.place(all, &contents(all)).unwrap(), 2 * HUGE_PAGE);
    assert_eq!((0..5).map(|number| read(&ram, number * HUGE_PAGE + 3)).collect::<Vec<_>>(), [0x59, 0, 0, 0x59, 1]);
    assert_eq!(pages.place_zero(PageRun::new(0, 6 * HUGE_PAGE)).unwrap(), HUGE_PAGE);
    assert_eq!(pages.place(all, &contents(all)).unwrap(), 0);
}

#[test]
fn discarded_huge_pages_are_missing_again() {
    let _provision = Provision::new(3);
    let ram = GuestRam::allocate_hugetlb(3 * GRANULE).unwrap();
    // Precopy.
    // SAFETY: the range is mapped and nobody else uses it.
    unsafe { ram.base().write_bytes(1, 3 * GRANULE as usize) };
    let pages = Userfaultfd::open().unwrap().register(ram.clone()).unwrap();
    pages.discard(huge(1)).unwrap();
    let mut there = PageSet::empty(ram.pages());
    populated::populated(&ram, &mut there);
    assert_eq!(there.runs().collect::<Vec<_>>(), [huge(0), huge(2)]);
    let all = PageRun::new(0, 3 * HUGE_PAGE);
    assert_eq!(pages.place(all, &contents(all)).unwrap(), HUGE_PAGE);
    assert_eq!((0..3).map(|number| read(&ram, number * HUGE_PAGE)).collect::<Vec<_>>(), [1, 0x5a, 1]);
    pages.unregister().unwrap();
}

#[test]
fn parts_of_huge_pages_are_refused() {
    let (_provision, _ram, pages, _event) = missing_hugetlb(2);
    for run in [PageRun::new(0, 1), PageRun::new(1, HUGE_PAGE), PageRun::new(0, HUGE_PAGE + 1), PageRun::new(0, 0), huge(2)] {
        assert!(matches!(pages.place_zero(run), Err(UffdError::BadRun(_))), "{run}");
        assert!(matches!(pages.place(run, &vec![0; run.bytes() as usize]), Err(UffdError::BadRun(_))), "{run}");
        assert!(matches!(pages.discard(run), Err(UffdError::BadRun(_))), "{run}");
        assert!(matches!(pages.wake(run), Err(UffdError::BadRun(_))), "{run}");
    }
}

/// As for small pages: everybody gets everything, once.
#[test]
fn many_threads_race_for_the_same_huge_pages() {
    let (_provision, ram, pages, event) = missing_hugetlb(8);
    let placed = AtomicU64::new(0);
    let place = |run: PageRun| placed.fetch_add(pages.place(run, &contents(run)).unwrap(), Ordering::Relaxed);
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            while let Some(Fault { page, .. }) = pages.next_fault(stop(&event)).unwrap() {
                place(PageRun { first: page, count: HUGE_PAGE });
            }
        });
        let background = scope.spawn(|| {
            for pair in 0..4 {
                place(PageRun::new(pair * 2 * HUGE_PAGE, 2 * HUGE_PAGE));
            }
        });
        let touchers: Vec<_> = (0..4)
            .map(|thread| {
                let ram = &ram;
                scope.spawn(move || {
                    for index in (0..ram.pages()).step_by(37) {
                        let page = index * (2 * thread + 1) % ram.pages();
                        assert_eq!(read(ram, page), page as u8 ^ 0x5a);
                    }
                })
            })
            .collect();
        background.join().unwrap();
        touchers.into_iter().for_each(|thread| thread.join().unwrap());
        event.write(1).unwrap();
        server.join().unwrap();
    });
    assert_eq!(placed.into_inner(), ram.pages());
    pages.unregister().unwrap();
}
