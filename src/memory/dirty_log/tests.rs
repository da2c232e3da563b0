use super::*;
use crate::memory::dirty_tracker::test_guest::{Guest, Means, SYSTEM, without_system};
use crate::memory::ram::GRANULE;
use crate::memory::{PAGE_SIZE, PageNumber};

fn guest() -> Guest {
    Guest::new(2 * GRANULE, Means::Log)
}

fn start(guest: &Guest) -> (DirtyLog, PageSet) {
    let mut first = PageSet::empty(guest.ram.pages());
    (DirtyLog::start(guest.tracking.vm().clone(), guest.ram.clone(), &mut first).unwrap(), first)
}

fn clear_all(log: &mut DirtyLog, pages: &PageSet) {
    log.clear(pages, PageRun::new(0, pages.universe())).unwrap();
}

fn harvest(log: &mut DirtyLog) -> Vec<u64> {
    let mut found = PageSet::empty(log.ram.pages());
    log.harvest(&mut found).unwrap();
    without_system(&found)
}

#[test]
fn a_page_is_reported_once_until_it_is_cleared() {
    let mut guest = guest();
    guest.write(40);
    let (mut log, first) = start(&guest);
    guest.write(40);
    guest.write(100);
    assert_eq!(harvest(&mut log), [100], "touched pages are known to be dirty until they are cleared");
    assert!(harvest(&mut log).is_empty(), "reported once");
    clear_all(&mut log, &first);
    guest.write(40);
    assert_eq!(harvest(&mut log), [40]);
    let mut both = PageSet::empty(guest.ram.pages());
    both.insert(PageRun::new(40, 1));
    both.insert(PageRun::new(100, 1));
    clear_all(&mut log, &both);
    guest.write(41);
    assert_eq!(harvest(&mut log), [41]);
    log.stop().unwrap();
}

#[test]
fn only_the_named_pages_within_the_range_are_cleared() {
    let mut guest = guest();
    let pages = [10, 63, 64, 65, 130];
    pages.iter().for_each(|page| guest.write(*page));
    let (mut log, mut first) = start(&guest);
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
fn without_manual_protect_fetching_clears() {
    let mut guest = guest();
    guest.write(40);
    // Nothing has enabled the capability for this VM yet: its log is the plain one.
    let ram = guest.ram.clone();
    let none = PageSet::empty(ram.pages());
    let (vm, page_tables) = (guest.tracking.vm().clone(), Pagemap::open().ok());
    let fetched = vec![0; none.words().len()];
    let mut log = DirtyLog { vm, reported: none.clone(), untouched: none, page_tables, manual_protect: false, fetched, ram };
    switch(&log.vm, &log.ram, true).unwrap();
    let mut first = PageSet::empty(guest.ram.pages());
    log.collect_populated(&mut first).unwrap();
    assert_eq!(first.runs().collect::<Vec<_>>(), [SYSTEM, PageRun::new(40, 1)]);
    guest.write(50);
    assert_eq!(harvest(&mut log), [50]);
    assert!(harvest(&mut log).is_empty());
    clear_all(&mut log, &first);
    guest.write(50);
    assert_eq!(harvest(&mut log), [50]);
}

#[test]
fn first_touches_of_blocks_that_nobody_had_touched_are_found() {
    let mut guest = Guest::new(5 * BLOCK * PAGE_SIZE as u64, Means::Log);
    guest.write(2 * BLOCK + 7);
    let (mut log, first) = start(&guest);
    assert_eq!(without_system(&first), [2 * BLOCK + 7]);
    // All but where the guest itself is, and what it has touched.
    let left = [PageRun::new(BLOCK, BLOCK), PageRun::new(3 * BLOCK, 2 * BLOCK)];
    let untouched = |log: &DirtyLog| log.untouched.runs().collect::<Vec<_>>();
    // Linux before 6.7 cannot scan, and then nothing is left to its page tables.
    let is_left = log.manual_protect && !log.whole_blocks(&PageSet::full(guest.ram.pages())).is_empty();
    assert_eq!(untouched(&log), if is_left { &left[..] } else { &[] });
    let mut all = PageSet::full(guest.ram.pages());
    clear_all(&mut log, &all);
    assert!(harvest(&mut log).is_empty());
    let pages = [BLOCK, 2 * BLOCK - 1, 4 * BLOCK + 5];
    pages.iter().for_each(|page| guest.write(*page));
    assert_eq!(harvest(&mut log), pages);
    let left = [PageRun::new(3 * BLOCK, BLOCK)];
    assert_eq!(untouched(&log), if is_left { &left[..] } else { &[] });
    // From here on the log tells, of their neighbours as well.
    guest.write(BLOCK + 1);
    guest.write(3 * BLOCK);
    assert_eq!(harvest(&mut log), [BLOCK + 1, 3 * BLOCK]);
    assert!(harvest(&mut log).is_empty(), "reported once");
    all.remove(PageRun::new(BLOCK, 1));
    clear_all(&mut log, &all);
    [BLOCK, BLOCK + 1, 2 * BLOCK + 7, 3 * BLOCK].into_iter().for_each(|page| guest.write(page));
    let again = if log.manual_protect { &[BLOCK + 1, 2 * BLOCK + 7, 3 * BLOCK][..] } else { &[BLOCK, BLOCK + 1, 2 * BLOCK + 7, 3 * BLOCK] };
    assert_eq!(harvest(&mut log), again, "the first of them was not cleared");
    log.stop().unwrap();
}

#[test]
fn masks_cut_the_run_out_of_a_word() {
    assert_eq!(mask_of_word(PageRun::new(0, 128), 1), !0);
    assert_eq!(mask_of_word(PageRun::new(66, 2), 1), 0b1100);
    assert_eq!(mask_of_word(PageRun::new(66, 2), 0), 0);
    assert_eq!(mask_of_word(PageRun::new(63, 2), 0), 1 << 63);
    assert_eq!(mask_of_word(PageRun::new(63, 2), 1), 1);
}
