use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::*;
use crate::memory::ram::GRANULE;
use crate::memory::uffd::Userfaultfd;
use crate::memory::{GuestRam, HUGE_PAGE, PageNumber, thp};
use crate::migrate::transport::Wake;

const HUGE: PageRun = PageRun::new(HUGE_PAGE, HUGE_PAGE);

/// RAM of three huge pages of which nothing is there, and an area in which the second one is to come. Nothing on a kernel before Linux 6.8,
/// where pages come one by one.
fn missing() -> Option<(GuestRam, MissingPages, StagingArea)> {
    let ram = GuestRam::allocate(3 * GRANULE).unwrap();
    let pages = Userfaultfd::open().unwrap().register(ram.clone()).unwrap();
    if !pages.can_replace() {
        println!("this kernel has no UFFDIO_MOVE");
        return None;
    }
    let area = StagingArea::new(&ram).unwrap();
    Some((ram, pages, area))
}

fn fill(area: &StagingArea, run: PageRun) {
    for page in run.pages() {
        word(area.ram(), page).store(page.0, Ordering::Relaxed);
    }
}

/// The first word of `page`.
fn word(ram: &GuestRam, page: PageNumber) -> &AtomicU64 {
    // SAFETY: the page is mapped for as long as `ram`, and is only accessed as words.
    unsafe { ram.host_address(PageRun::single(page)).unwrap().cast().as_ref() }
}

#[test]
fn what_the_guest_has_stays_and_the_rest_comes() {
    let Some((ram, pages, area)) = missing() else { return };
    fill(&area, HUGE);
    let [placed, zero] = [PageNumber(HUGE_PAGE + 7), PageNumber(HUGE_PAGE + 9)];
    pages.place(PageRun::single(placed), &[1; PAGE_SIZE]).unwrap();
    word(&ram, placed).store(77, Ordering::Relaxed);
    pages.place_zero(PageRun::single(zero)).unwrap();
    pages.replace(HUGE, &area).unwrap();
    for page in HUGE.pages() {
        let expected = if page == placed {
            77
        } else if page == zero {
            0
        } else {
            page.0
        };
        assert_eq!(word(&ram, page).load(Ordering::Relaxed), expected, "{page}");
    }
    assert_eq!(thp::huge_ranges(&ram), [HUGE], "it is a huge page here, too");
    // Its neighbours are missing as before.
    assert_eq!(pages.place_zero(PageRun::new(0, HUGE_PAGE)).unwrap(), HUGE_PAGE);
    assert_eq!(pages.place_zero(PageRun::new(2 * HUGE_PAGE, HUGE_PAGE)).unwrap(), HUGE_PAGE);
    assert_eq!(pages.place(PageRun::single(placed), &[1; PAGE_SIZE]).unwrap(), 0);
}

#[test]
fn what_did_not_come_together_as_a_huge_page_is_placed_all_the_same() {
    let Some((ram, pages, area)) = missing() else { return };
    thp::forbid(area.ram()).unwrap();
    // The others are zero, and nothing is there.
    fill(&area, PageRun::new(HUGE_PAGE + 1, 40));
    let placed = PageNumber(HUGE_PAGE + 20);
    pages.place(PageRun::single(placed), &[1; PAGE_SIZE]).unwrap();
    word(&ram, placed).store(77, Ordering::Relaxed);
    pages.replace(HUGE, &area).unwrap();
    for page in HUGE.pages() {
        let expected = if page == placed {
            77
        } else if (1..41).contains(&(page.0 - HUGE_PAGE)) {
            page.0
        } else {
            0
        };
        assert_eq!(word(&ram, page).load(Ordering::Relaxed), expected, "{page}");
    }
    assert!(matches!(pages.replace(PageRun::new(HUGE_PAGE, 1), &area), Err(UffdError::BadRun(_))));
    assert!(matches!(pages.replace(PageRun::new(3 * HUGE_PAGE, HUGE_PAGE), &area), Err(UffdError::BadRun(_))));
}

#[test]
fn without_room_to_put_them_aside_pages_are_placed_one_by_one() {
    let Some((ram, pages, area)) = missing() else { return };
    fill(&area, HUGE);
    let placed = PageNumber(HUGE_PAGE + 20);
    pages.place(PageRun::single(placed), &[1; PAGE_SIZE]).unwrap();
    word(&ram, placed).store(77, Ordering::Relaxed);
    area.aside().take();
    pages.replace(HUGE, &area).unwrap();
    for page in HUGE.pages() {
        let expected = if page == placed { 77 } else { page.0 };
        assert_eq!(word(&ram, page).load(Ordering::Relaxed), expected, "{page}");
    }
    assert_eq!(word(area.ram(), PageNumber(HUGE_PAGE + 1)).load(Ordering::Relaxed), 0, "what was copied is given back");
}

#[test]
fn who_touches_a_missing_page_meanwhile_is_woken() {
    let Some((ram, pages, area)) = missing() else { return };
    fill(&area, HUGE);
    thread::scope(|scope| {
        let stop = Wake::new().unwrap();
        let waiter = scope.spawn(|| word(&ram, PageNumber(HUGE_PAGE + 3)).load(Ordering::Relaxed));
        pages.next_fault(&stop).unwrap().unwrap();
        pages.replace(HUGE, &area).unwrap();
        assert_eq!(waiter.join().unwrap(), HUGE_PAGE + 3);
    });
}

/// Threads that replace different huge pages do not mix them up.
#[test]
fn several_are_replaced_at_a_time() {
    for _ in 0..20 {
        let Some((ram, pages, area)) = missing() else { return };
        let huge = |number: u64| PageRun::new(number * HUGE_PAGE, HUGE_PAGE);
        let own = |number: u64| PageNumber(number * HUGE_PAGE + 5);
        for number in 0..3 {
            fill(&area, huge(number));
            pages.place_zero(PageRun::single(own(number))).unwrap();
            word(&ram, own(number)).store(1000 + number, Ordering::Relaxed);
        }
        thread::scope(|scope| {
            for number in 0..3 {
                let (pages, area) = (&pages, &area);
                scope.spawn(move || pages.replace(huge(number), area).unwrap());
            }
        });
        for number in 0..3 {
            assert_eq!(word(&ram, own(number)).load(Ordering::Relaxed), 1000 + number);
            assert_eq!(word(&ram, PageNumber(number * HUGE_PAGE + 6)).load(Ordering::Relaxed), number * HUGE_PAGE + 6);
        }
    }
}

/// A guest that goes on writing while its pages are put aside and come back.
#[test]
fn no_write_is_lost() {
    for _ in 0..20 {
        let Some((ram, pages, area)) = missing() else { return };
        fill(&area, HUGE);
        let own = PageNumber(HUGE_PAGE + 100);
        pages.place_zero(PageRun::single(own)).unwrap();
        let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut writes = 0;
                while !done.load(Ordering::Relaxed) {
                    word(&ram, own).fetch_add(1, Ordering::Relaxed);
                    writes += 1;
                    begun.store(true, Ordering::Relaxed);
                }
                writes
            });
            while !begun.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            pages.replace(HUGE, &area).unwrap();
            done.store(true, Ordering::Relaxed);
            let writes = writer.join().unwrap();
            assert_eq!(word(&ram, own).load(Ordering::Relaxed), writes);
        });
    }
}
