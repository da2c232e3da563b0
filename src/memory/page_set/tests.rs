use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn members(set: &PageSet) -> BTreeSet<u64> {
    set.runs().flat_map(|run| run.pages()).map(|page| page.0).collect()
}

proptest! {
    #[test]
    fn behaves_like_a_set(
        pages in 1u64..300,
        // Of which many words are zero.
        scale in prop::sample::select(vec![1, 50]),
        steps in prop::collection::vec((any::<bool>(), 0u64..320, 0u64..200), 0..40),
        within in (0u64..320, 0u64..320),
    ) {
        let pages = pages * scale;
        let mut set = PageSet::empty(pages);
        let mut model = BTreeSet::new();
        for (add, first, count) in steps {
            let run = PageRun::new(first * scale, count);
            let wanted: BTreeSet<u64> = run.pages().map(|page| page.0).filter(|page| *page < pages).collect();
            let changed = if add { set.insert(run) } else { set.remove(run) };
            let before = model.len();
            if add { model.extend(wanted) } else { model.retain(|page| !wanted.contains(page)) }
            prop_assert_eq!(changed, before.abs_diff(model.len()) as u64);
            prop_assert_eq!(set.len(), model.len() as u64);
        }
        let within = PageRun::new(within.0 * scale, within.1 * scale);
        let found: Vec<u64> = set.runs_within(within).flat_map(|run| run.pages()).map(|page| page.0).collect();
        let wanted: Vec<u64> = model.range(within.first.0..within.end()).copied().collect();
        prop_assert_eq!(found, wanted);
        prop_assert_eq!(&set.clone(), &set);
        prop_assert_eq!(members(&set), model);
    }

    #[test]
    fn words_unite_and_subtract(
        pages in 1u64..200,
        scale in prop::sample::select(vec![1, 50]),
        a in prop::collection::vec(any::<u64>(), 4),
        b in prop::collection::vec(any::<u64>(), 4),
    ) {
        let fill = |words: &[u64]| {
            let mut set = PageSet::empty(pages * scale);
            words.iter().enumerate().for_each(|(index, bits)| set.insert_word(index * scale as usize, *bits));
            set
        };
        let (left, right) = (fill(&a), fill(&b));
        let mut both = left.clone();
        both.union(&right);
        prop_assert_eq!(members(&both), members(&left).union(&members(&right)).copied().collect());
        both.subtract(&right);
        prop_assert_eq!(members(&both), members(&left).difference(&members(&right)).copied().collect());
        prop_assert_eq!(both.len(), members(&both).len() as u64);
        let mut rebuilt = PageSet::empty(both.universe());
        both.runs().for_each(|run| { rebuilt.insert(run); });
        prop_assert_eq!(both, rebuilt);
    }
}

#[test]
fn runs_stop_at_the_limit_and_at_the_end() {
    let mut set = PageSet::full(130);
    assert_eq!(set.next_run(0, 64), Some(PageRun::new(0, 64)));
    assert_eq!(set.next_run(100, u64::MAX), Some(PageRun::new(100, 30)));
    assert_eq!(set.next_run(130, 1), None);
    set.remove(PageRun::new(0, 130));
    assert_eq!(set.next_run(0, 1), None);
}
