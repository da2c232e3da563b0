use super::*;
use crate::memory::HUGE_PAGE;

fn ram(pages: u64) -> Layout {
    Layout::new(pages, HostPage::SMALL, &[]).unwrap()
}

fn incoming(missing: PageRun) -> Incoming {
    let mut pages = PageSet::empty(4096);
    pages.insert(missing);
    Incoming::new(pages, ram(4096))
}

#[test]
fn of_huge_pages_whole_ones_are_asked_for() {
    let host_page = HostPage::HUGE;
    let whole = |number: u64| PageRun::new(number * HUGE_PAGE, HUGE_PAGE);
    let layout = Layout::new(4096, host_page, &[]).unwrap();
    let mut missing = PageSet::empty(4096);
    missing.insert(whole(0));
    missing.insert(PageRun::new(2 * HUGE_PAGE, 2 * HUGE_PAGE));
    let mut incoming = Incoming::new(missing, layout);
    let ms = Duration::from_millis;
    assert_eq!(incoming.fault(PageNumber(HUGE_PAGE + 7), ms(1)), FaultAnswer::Zero(whole(1)));
    assert_eq!(incoming.fault(PageNumber(7), ms(2)), FaultAnswer::Request(whole(0)));
    assert_eq!(incoming.fault(PageNumber(300), ms(3)), FaultAnswer::Wait);
    assert!(incoming.prefetch(PageNumber(300)).is_empty());
    assert_eq!(incoming.waiting(), [PageNumber(0)]);
    assert_eq!(incoming.renew(), [whole(0)]);
    assert_eq!(incoming.placed(whole(0), ms(12)), [ms(10)]);
    assert_eq!(incoming.missing().len(), 2 * HUGE_PAGE);
}

#[test]
fn several_faults_are_in_service_at_a_time() {
    let mut incoming = incoming(PageRun::new(0, 4096));
    let ms = Duration::from_millis;
    for page in [5, 1000, 3000] {
        let page = PageNumber(page);
        assert_eq!(incoming.fault(page, ms(page.0)), FaultAnswer::Request(PageRun::single(page)));
        assert_eq!(incoming.fault(page, ms(9999)), FaultAnswer::Wait);
    }
    assert_eq!(incoming.waiting(), [5, 1000, 3000].map(PageNumber));
    assert_eq!(incoming.placed(PageRun::new(1000, 1), ms(1005)), [ms(5)]);
    assert_eq!(incoming.placed(PageRun::new(0, 4096), ms(3005)), [ms(3000), ms(5)]);
}

#[test]
fn who_touches_a_page_that_is_coming_in_advance_waits_for_it() {
    let mut incoming = incoming(PageRun::new(10, 100));
    let mut ahead = Vec::new();
    for page in [10, 11] {
        incoming.fault(PageNumber(page), Duration::ZERO);
        ahead.extend(incoming.prefetch(PageNumber(page)));
    }
    assert_eq!(ahead, [PageRun::new(12, 4)]);
    assert_eq!(incoming.waiting(), [10, 11].map(PageNumber), "nobody waits for what comes in advance");
    assert_eq!(incoming.fault(PageNumber(12), Duration::ZERO), FaultAnswer::Wait);
    assert_eq!(incoming.waiting().len(), 3);
    incoming.prefetch(PageNumber(12));
    assert_eq!(incoming.prefetched().1, 1);
    // On a new link only what is waited for is asked for.
    assert_eq!(incoming.renew(), [10, 11, 12].map(|page| PageRun::new(page, 1)));
    assert_eq!(incoming.fault(PageNumber(14), Duration::ZERO), FaultAnswer::Request(PageRun::new(14, 1)));
}

#[test]
fn what_the_background_brings_sooner_was_not_needed_in_advance() {
    let mut incoming = incoming(PageRun::new(10, 100));
    for page in [10, 11] {
        incoming.fault(PageNumber(page), Duration::ZERO);
        incoming.prefetch(PageNumber(page));
    }
    incoming.placed(PageRun::new(12, 1), Duration::ZERO);
    incoming.comes_anyway(PageRun::new(12, 50));
    incoming.placed(PageRun::new(12, 50), Duration::ZERO);
    incoming.fault(PageNumber(62), Duration::ZERO);
    incoming.prefetch(PageNumber(62));
    assert_eq!(incoming.prefetched(), (4 + 8, 1), "only the first of four came in advance");
}

#[test]
fn little_is_on_its_way_in_advance() {
    let mut incoming = incoming(PageRun::new(0, 4096));
    let mut ahead = 0;
    for page in 0..64 {
        incoming.fault(PageNumber(page), Duration::ZERO);
        let runs = incoming.prefetch(PageNumber(page));
        ahead += runs.iter().map(|run| run.count).sum::<u64>();
        assert!(incoming.requested.len() - incoming.since.len() as u64 <= MAX_AHEAD, "at {page}");
    }
    assert!(ahead > MAX_AHEAD, "{ahead}");
}

#[test]
fn blocks_are_asked_for_once_and_again_on_a_new_link() {
    let layout = Layout::new(100, HostPage::SMALL, &[2000]).unwrap();
    let storage = layout.pages_of(0).unwrap().first.0;
    let mut missing = PageSet::empty(layout.pages());
    let run = |first, count| PageRun::new(storage + first, count);
    missing.insert(run(10, 1500));
    missing.insert(PageRun::new(7, 1));
    let mut incoming = Incoming::new(missing, layout);
    let ms = Duration::from_millis;
    assert_eq!(incoming.wait_for_blocks(run(0, 12), ms(1)), [run(10, 2)]);
    assert_eq!(incoming.wait_for_blocks(run(8, 6), ms(2)), [run(12, 2)]);
    assert_eq!(incoming.wait_for_blocks(run(10, 4), ms(3)), []);
    assert_eq!(incoming.fault(PageNumber(7), ms(4)), FaultAnswer::Request(PageRun::new(7, 1)));
    assert_eq!(incoming.placed(run(10, 1), ms(5)), [ms(4)]);
    assert_eq!(incoming.renew(), [PageRun::new(7, 1), run(11, 3)]);
    assert_eq!(incoming.wait_for_blocks(run(100, 1024), ms(6)), [run(100, MAX_RUN), run(100 + MAX_RUN, MAX_RUN)]);
    assert_eq!(incoming.renew().len(), 4);
    assert_eq!(incoming.wait_for_blocks(run(0, 5), ms(7)), []);
}

#[test]
fn what_is_said_after_all_has_come_changes_nothing() {
    let mut incoming = incoming(PageRun::new(0, 64));
    let ms = Duration::from_millis;
    for page in 0..3 {
        incoming.fault(PageNumber(page), ms(1));
        incoming.prefetch(PageNumber(page));
    }
    incoming.comes_anyway(PageRun::new(0, 64));
    assert_eq!(incoming.placed(PageRun::new(0, 64), ms(2)), [ms(1); 3]);
    let ahead = incoming.prefetched();
    incoming.forget_pages();
    assert!(incoming.is_whole() && incoming.missing().universe() == 0);
    assert_eq!(incoming.fault(PageNumber(5), ms(3)), FaultAnswer::Zero(PageRun::new(5, 1)));
    incoming.comes_anyway(PageRun::new(5, 8));
    assert!(!incoming.receive_staged(PageRun::new(0, 64)));
    assert_eq!(incoming.placed(PageRun::new(5, 8), ms(4)), []);
    assert_eq!((incoming.renew(), incoming.prefetched()), (vec![], ahead));
}
