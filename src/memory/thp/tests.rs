use std::time::{Duration, Instant};

use super::*;
use crate::memory::PAGE_SIZE;
use crate::memory::hugetlb::provision::Provision;
use crate::memory::ram::GRANULE;
use crate::memory::uffd::Userfaultfd;

fn write(ram: &GuestRam, page: u64) {
    // SAFETY: the page is mapped and nobody else uses it.
    unsafe { ram.host_address(PageRun::new(page, 1)).unwrap().write_volatile(1) }
}

fn huge(first: u64, count: u64) -> PageRun {
    PageRun::new(first * HUGE_PAGE, count * HUGE_PAGE)
}

fn populated_pages(ram: &GuestRam) -> Vec<PageRun> {
    let mut found = PageSet::empty(ram.pages());
    populated(ram, &mut found);
    found.runs().collect()
}

/// Bytes of `ram` in huge pages, as the kernel accounts for them in another place.
fn anon_huge_bytes(ram: &GuestRam) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (begin, end) = (ram.base().as_ptr() as u64, ram.base().as_ptr() as u64 + ram.size());
    let mut inside = false;
    let mut kib = 0;
    for line in smaps.lines() {
        let range = line.split_whitespace().next().and_then(|word| word.split_once('-'));
        if let Some((first, last)) = range.and_then(|(a, b)| Some((u64::from_str_radix(a, 16).ok()?, u64::from_str_radix(b, 16).ok()?))) {
            inside = first >= begin && last <= end;
        } else if let Some(size) = line.strip_prefix("AnonHugePages:").filter(|_| inside) {
            kib += size.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    kib * 1024
}

/// RAM whose `page`s are written, in small pages.
fn small_pages(granules: u64, pages: impl IntoIterator<Item = u64>) -> GuestRam {
    let ram = GuestRam::allocate(granules * GRANULE).unwrap();
    forbid(&ram).unwrap();
    pages.into_iter().for_each(|page| write(&ram, page));
    ram
}

/// Rebuilds until so many have been in all: the kernel leaves out a page that somebody holds just then.
fn rebuild_so_many(ram: &GuestRam, ranges: &[PageRun], wanted: u64) -> u64 {
    let end = Instant::now() + Duration::from_secs(20);
    let mut rebuilt = 0;
    while rebuilt < wanted && Instant::now() < end {
        rebuilt += rebuild(ram, ranges, &AtomicBool::new(false));
    }
    rebuilt
}

fn rebuild_until(ram: &GuestRam, wanted: u64) -> u64 {
    rebuild_so_many(ram, &[PageRun::new(0, ram.pages())], wanted)
}

fn rebuild_all(ram: &GuestRam) -> u64 {
    rebuild(ram, &[PageRun::new(0, ram.pages())], &AtomicBool::new(false))
}

#[test]
fn small_pages_become_huge_and_are_found() {
    let ram = small_pages(6, (HUGE_PAGE..3 * HUGE_PAGE).chain([5 * HUGE_PAGE + 17]));
    assert_eq!((huge_ranges(&ram), anon_huge_bytes(&ram)), (vec![], 0));
    allow(&ram);
    assert_eq!(rebuild_until(&ram, 3), 3, "what was never touched takes no memory now");
    assert_eq!(huge_ranges(&ram), [huge(1, 2), huge(5, 1)]);
    assert_eq!(anon_huge_bytes(&ram), 3 * GRANULE);
    assert_eq!(populated_pages(&ram), [huge(1, 2), huge(5, 1)]);
    // SAFETY: the page is mapped and nobody else uses it.
    let bytes = [5 * HUGE_PAGE + 17, 5 * HUGE_PAGE].map(|page| unsafe { ram.base().add(page as usize * PAGE_SIZE).read_volatile() });
    assert_eq!(bytes, [1, 0]);
    assert_eq!(rebuild_all(&ram), 0, "what is huge is left alone");
}

#[test]
fn only_what_is_named_is_rebuilt() {
    let ram = small_pages(4, 0..4 * HUGE_PAGE);
    allow(&ram);
    assert_eq!(rebuild_so_many(&ram, &[huge(1, 1), huge(3, 1)], 2), 2);
    assert_eq!(huge_ranges(&ram), [huge(1, 1), huge(3, 1)]);
    assert_eq!(rebuild(&ram, &[huge(0, 4)], &AtomicBool::new(true)), 0, "stopped");
    assert_eq!(rebuild(&ram, &[PageRun::new(ram.pages(), 512), PageRun::new(u64::MAX, 2)], &AtomicBool::new(false)), 0);
}

#[test]
fn a_page_outside_the_allowed_ranges_is_populated_alone() {
    let ram = GuestRam::allocate(4 * GRANULE).unwrap();
    allow_only(&ram, &[huge(1, 2)]);
    [3, HUGE_PAGE + 3, 3 * HUGE_PAGE + 3].into_iter().for_each(|page| write(&ram, page));
    let found = populated_pages(&ram);
    assert!(found.contains(&PageRun::new(3, 1)) && found.contains(&PageRun::new(3 * HUGE_PAGE + 3, 1)), "{found:?}");
    // Inside, the kernel makes a huge page of it, if its settings allow any and it finds one.
    assert!(found.contains(&huge(1, 1)) == (anon_huge_bytes(&ram) == GRANULE), "{found:?}");
    allow(&ram);
    let wanted = 4 - 1 - u64::from(found.contains(&huge(1, 1)));
    assert_eq!(rebuild_until(&ram, wanted), wanted);
}

#[test]
fn a_discarded_page_splits_its_huge_page() {
    let ram = small_pages(2, 0..2 * HUGE_PAGE);
    allow(&ram);
    assert_eq!(rebuild_until(&ram, 2), 2);
    // SAFETY: the page is mapped and nobody else uses it.
    unsafe { madvise(ram.base().as_ptr().add(5 * PAGE_SIZE).cast(), PAGE_SIZE, Advice::LinuxDontNeed).unwrap() };
    assert_eq!(huge_ranges(&ram), [huge(1, 1)]);
    assert_eq!(rebuild_until(&ram, 1), 1);
    assert_eq!(huge_ranges(&ram), [huge(0, 2)]);
}

#[test]
fn what_a_postcopy_has_split_is_rebuilt() {
    let ram = small_pages(3, 0..2 * HUGE_PAGE);
    allow(&ram);
    assert_eq!(rebuild_until(&ram, 2), 2);
    let pages = Userfaultfd::open().unwrap().register(ram.clone()).unwrap();
    pages.discard(PageRun::new(5, 3)).unwrap();
    assert_eq!(pages.place(PageRun::new(5, 3), &[2; 3 * PAGE_SIZE]).unwrap(), 3);
    assert_eq!(pages.place_zero(huge(2, 1)).unwrap(), HUGE_PAGE);
    pages.unregister().unwrap();
    assert_eq!(huge_ranges(&ram), [huge(1, 1)]);
    assert_eq!(rebuild_until(&ram, 1), 1);
    assert_eq!(huge_ranges(&ram), [huge(0, 2)]);
    assert_eq!(populated_pages(&ram), [huge(0, 2)], "zero pages take no memory");
}

#[test]
fn of_too_many_ranges_the_longest_are_kept() {
    let ranges = vec![huge(0, 1), huge(2, 3), huge(6, 1), huge(8, 9)];
    assert_eq!(longest(ranges.clone(), 2), [huge(2, 3), huge(8, 9)]);
    assert_eq!(longest(ranges.clone(), 3), [huge(0, 1), huge(2, 3), huge(8, 9)]);
    assert_eq!(longest(ranges.clone(), 4), ranges);
}

#[test]
fn hugetlb_memory_has_no_transparent_huge_pages() {
    let _provision = Provision::new(2);
    let ram = GuestRam::allocate_hugetlb(2 * GRANULE).unwrap();
    write(&ram, 3);
    assert_eq!(huge_ranges(&ram), []);
    forbid(&ram).unwrap();
    allow_only(&ram, &[huge(0, 1)]);
    allow(&ram);
    assert_eq!(rebuild_all(&ram), 0);
}
