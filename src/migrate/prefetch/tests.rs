use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

/// Pages of which none is on its way: what is asked for is here at once.
struct Memory {
    prefetch: Prefetch,
    missing: PageSet,
    faults: u64,
}

impl Memory {
    fn new(pages: u64) -> Self {
        let mut missing = PageSet::empty(pages);
        missing.insert(PageRun::new(0, pages));
        Memory { prefetch: Prefetch::new(pages), missing, faults: 0 }
    }

    /// Touches `page`; returns what was proposed if it was missing.
    fn touch(&mut self, page: u64) -> Vec<PageRun> {
        if self.missing.remove(PageRun::new(page, 1)) == 0 {
            return Vec::new();
        }
        self.faults += 1;
        let runs = self.prefetch.fault(PageNumber(page), MAX_AHEAD, |page| self.missing.contains(page));
        for run in &runs {
            assert_eq!(self.missing.remove(*run), run.count, "{run} was proposed, but is not all missing");
        }
        runs
    }
}

/// Cheap numbers without order.
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[test]
fn the_window_of_a_line_grows() {
    let mut memory = Memory::new(1 << 20);
    assert_eq!(memory.touch(100), []);
    assert_eq!(memory.touch(101), [PageRun::new(102, 4)]);
    assert_eq!(memory.touch(106), [PageRun::new(107, 8)]);
    assert_eq!(memory.touch(115), [PageRun::new(116, 8), PageRun::new(124, 8)]);
    assert_eq!((memory.prefetch.proposed(), memory.prefetch.used()), (28, 12));
}

#[test]
fn strides_are_learned_in_both_directions() {
    for stride in [1, 2, 7, 64, -1, -3, -64i64] {
        let mut memory = Memory::new(1 << 20);
        let mut page = 1 << 19;
        for _ in 0..4096 {
            memory.touch(page);
            page = page.checked_add_signed(stride).unwrap();
        }
        assert!(memory.faults < 4096 / 20, "stride {stride}: {} faults", memory.faults);
        let in_vain = memory.prefetch.proposed() - memory.prefetch.used();
        assert!(in_vain <= MAX_AHEAD, "stride {stride}: {in_vain} in vain");
    }
}

#[test]
fn lines_are_told_apart_from_one_another_and_from_noise() {
    let mut memory = Memory::new(1 << 20);
    for step in 0..4096 {
        for line in 0..4 {
            memory.touch((line << 18) + step);
        }
        memory.touch(mix(step) % (1 << 20));
    }
    assert!(memory.faults < 4096 + 4 * 4096 / 10, "{} faults", memory.faults);
}

#[test]
fn pages_that_came_by_themselves_do_not_break_a_line() {
    let mut memory = Memory::new(1 << 16);
    memory.touch(0);
    memory.touch(1);
    // The background has sent what lies behind the proposed pages.
    memory.missing.remove(PageRun::new(6, 200));
    assert_eq!(memory.touch(206), [PageRun::new(207, 8)]);
    assert_eq!(memory.prefetch.used(), 4);
}

#[test]
fn a_page_that_is_wanted_before_it_has_come_was_of_use() {
    let mut prefetch = Prefetch::new(1 << 16);
    let mut asked = HashSet::from([10, 11]);
    let mut fault = |page, room| {
        let runs = prefetch.fault(PageNumber(page), room, |page| page.0 >= 10 && !asked.contains(&page.0));
        asked.extend(runs.iter().flat_map(|run| run.pages()).map(|page| page.0));
        (runs, prefetch.used())
    };
    fault(10, 64);
    assert_eq!(fault(11, 64), (vec![PageRun::new(12, 4)], 0));
    // Three of eight are on their way still.
    assert_eq!(fault(12, 64), (vec![PageRun::new(16, 5)], 1));
    // No room.
    assert_eq!(fault(14, 0), (vec![], 3));
}

#[test]
fn a_line_that_is_not_followed_was_in_vain() {
    let mut memory = Memory::new(1 << 20);
    for line in 0..1000 {
        memory.touch(line * 1000);
        memory.touch(line * 1000 + 1);
    }
    let proposed = memory.prefetch.proposed();
    assert_eq!(memory.prefetch.used(), 0);
    assert!((FIRST_CREDIT..=FIRST_CREDIT + memory.faults / FAULTS_PER_CREDIT).contains(&proposed), "{proposed}");
}

#[test]
fn random_touches_cost_next_to_nothing() {
    for pages in [1 << 12, 1 << 14, 1 << 18] {
        let mut memory = Memory::new(pages);
        for number in 0..pages {
            memory.touch(mix(number) % pages);
        }
        let in_vain = memory.prefetch.proposed() - memory.prefetch.used();
        assert!(in_vain < 64 + memory.faults / 8, "{pages} pages: {in_vain} in vain of {} faults", memory.faults);
    }
}

proptest! {
    #[test]
    fn what_is_proposed_is_bounded(
        pages in 1u64..3000,
        touches in prop::collection::vec((0u64..3000, -70i64..70, 1u64..40, 0u64..100), 1..60),
    ) {
        let mut missing = PageSet::empty(pages);
        missing.insert(PageRun::new(0, pages));
        let mut prefetch = Prefetch::new(pages);
        let mut faults = 0;
        for (first, stride, count, room) in touches {
            for step in 0..count as i64 {
                let Some(page) = first.checked_add_signed(stride * step).filter(|page| *page < pages) else { break };
                // Also pages that were asked for before.
                missing.remove(PageRun::new(page, 1));
                faults += 1;
                let runs = prefetch.fault(PageNumber(page), room, |page| missing.contains(page));
                let count: u64 = runs.iter().map(|run| run.count).sum();
                prop_assert!(count <= room.min(MAX_AHEAD));
                for run in runs {
                    prop_assert!(run.is_within(pages) && run.count <= MAX_RUN);
                    prop_assert_eq!(missing.remove(run), run.count);
                }
                prop_assert!(prefetch.used() <= prefetch.proposed());
                let bound = FIRST_CREDIT + 2 * prefetch.used() + faults / FAULTS_PER_CREDIT;
                prop_assert!(prefetch.proposed() <= bound);
            }
        }
    }
}
