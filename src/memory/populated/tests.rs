use super::*;
use crate::memory::hugetlb::provision::Provision;
use crate::memory::ram::GRANULE;
use crate::memory::{HUGE_PAGE, thp};

/// RAM of 4 KiB pages, so that a touched page is populated alone.
fn ram_of_small_pages(granules: u64) -> GuestRam {
    let ram = GuestRam::allocate(granules * GRANULE).unwrap();
    thp::forbid(&ram).unwrap();
    ram
}

fn write(ram: &GuestRam, page: u64) {
    // SAFETY: the page is mapped and nobody else uses it.
    unsafe { ram.host_address(PageRun::new(page, 1)).unwrap().write_volatile(1) }
}

/// What an older kernel would find.
fn entries(ram: &GuestRam) -> Vec<PageRun> {
    let mut found = PageSet::empty(ram.pages());
    Pagemap::open().unwrap().read_entries(ram, &mut found).unwrap();
    found.runs().collect()
}

#[test]
fn written_pages_are_populated() {
    let ram = ram_of_small_pages(2);
    assert!(entries(&ram).is_empty());
    for page in [0, 3, 4, 700, ram.pages() - 1] {
        write(&ram, page);
    }
    let written = [PageRun::new(0, 1), PageRun::new(3, 2), PageRun::new(700, 1), PageRun::new(ram.pages() - 1, 1)];
    assert_eq!(entries(&ram), written);
    let mut found = PageSet::empty(ram.pages());
    assert_eq!(populated(&ram, &mut found), 5);
    assert_eq!(found.runs().collect::<Vec<_>>(), written);
    assert_eq!(populated(&ram, &mut found), 0, "none is new the second time");
}

#[test]
fn scan_goes_on_where_its_buffer_was_full() {
    let ram = ram_of_small_pages(8);
    (0..ram.pages()).step_by(2).for_each(|page| write(&ram, page));
    let mut found = PageSet::empty(ram.pages());
    assert_eq!(populated(&ram, &mut found), ram.pages() / 2);
    assert!(found.runs().all(|run| run.count == 1 && run.first.0 % 2 == 0));
}

#[test]
fn pages_that_were_only_read_are_left_out() {
    let ram = ram_of_small_pages(1);
    write(&ram, 9);
    // SAFETY: the page is mapped and nobody else uses it.
    let byte = unsafe { ram.host_address(PageRun::new(5, 1)).unwrap().read_volatile() };
    assert_eq!(byte, 0);
    let mut found = PageSet::empty(ram.pages());
    match Pagemap::open().unwrap().scan(&ram, PageRun::new(0, ram.pages()), PAGE_IS_PRESENT, &mut found) {
        Ok(()) => assert_eq!(found.runs().collect::<Vec<_>>(), [PageRun::new(9, 1)]),
        // Linux before 6.7 has no such ioctl and cannot tell.
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY)),
    }
}

#[test]
fn hugetlb_pages_are_populated_whole() {
    let _provision = Provision::new(3);
    let ram = GuestRam::allocate_hugetlb(3 * GRANULE).unwrap();
    let mut found = PageSet::empty(ram.pages());
    assert_eq!(populated(&ram, &mut found), 0);
    write(&ram, HUGE_PAGE + 9);
    assert_eq!(populated(&ram, &mut found), HUGE_PAGE);
    assert_eq!(found.runs().collect::<Vec<_>>(), [PageRun::new(HUGE_PAGE, HUGE_PAGE)]);
    assert_eq!(entries(&ram), [PageRun::new(HUGE_PAGE, HUGE_PAGE)]);
}
