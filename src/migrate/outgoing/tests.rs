use super::*;
use crate::memory::HUGE_PAGE;

fn ram(pages: u64) -> Layout {
    Layout::new(pages, HostPage::SMALL, &[]).unwrap()
}

#[test]
fn a_run_lies_in_the_chunk_that_was_cleared_for_it() {
    let mut dirty = PageSet::empty(3 * CLEAR_CHUNK);
    // So that runs of 300 pages do not end with a chunk by themselves.
    dirty.insert(PageRun::new(100, 3 * CLEAR_CHUNK - 100));
    let mut outgoing = Outgoing::new(ram(3 * CLEAR_CHUNK));
    outgoing.begin_pass(&dirty);
    let (mut cleared, mut sent) = (None, 0);
    loop {
        cleared = outgoing.take_chunk_to_clear().or(cleared);
        let Some(runs) = outgoing.take_next(300, 1) else { break };
        let chunk = cleared.unwrap();
        for run in runs {
            assert!(chunk.first <= run.first && run.end() <= chunk.end(), "{run} was sent when {chunk} had been cleared");
            sent += run.count;
        }
    }
    assert_eq!(sent, 3 * CLEAR_CHUNK - 100);
}

/// In a new pass with bits to clear, all that is sent at once, at most `max` pages, and all ranges that are cleared.
fn pass(dirty: &PageSet, max: u64, channels: u8) -> (Vec<Vec<PageRun>>, Vec<PageRun>) {
    let mut outgoing = Outgoing::new(ram(dirty.universe()));
    outgoing.begin_pass(dirty);
    let (mut batches, mut cleared) = (Vec::new(), Vec::new());
    loop {
        cleared.extend(outgoing.take_chunk_to_clear());
        let Some(runs) = outgoing.take_next(max, channels) else { break };
        let is_cleared = |run: &PageRun| cleared.iter().any(|chunk| chunk.first <= run.first && run.end() <= chunk.end());
        assert!(runs.iter().all(is_cleared), "{runs:?} were sent when {cleared:?} had been cleared");
        batches.push(runs);
    }
    assert!(outgoing.unsent().is_empty());
    (batches, cleared)
}

fn pages(universe: u64, pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::empty(universe);
    pages.into_iter().for_each(|page| {
        set.insert(PageRun::new(page, 1));
    });
    set
}

#[test]
fn pages_that_lie_apart_go_together_if_they_travel_on_one_connection() {
    let dirty = pages(4 * MAX_RUN, [3, 5, 6, 7, MAX_RUN - 1, MAX_RUN, MAX_RUN + 9, 2 * MAX_RUN + 1, 3 * MAX_RUN]);
    let run = PageRun::new;
    let (first, second) = ([run(3, 1), run(5, 3), run(MAX_RUN - 1, 1)], [run(MAX_RUN, 1), run(MAX_RUN + 9, 1)]);
    let (third, fourth) = (run(2 * MAX_RUN + 1, 1), run(3 * MAX_RUN, 1));
    let all = [&first[..], &second, &[third, fourth]].concat();
    assert_eq!(pass(&dirty, 300, 1).0, [all]);
    assert_eq!(pass(&dirty, 300, 2).0, [[&first[..], &[third]].concat(), [&second[..], &[fourth]].concat()]);
    assert_eq!(
        pass(&dirty, 3, 4).0,
        [vec![run(3, 1), run(5, 2)], vec![run(7, 1), run(MAX_RUN - 1, 1)], second.into(), vec![third], vec![fourth]]
    );
}

#[test]
fn where_little_is_to_be_sent_one_call_clears_much() {
    let universe = 64 * CLEAR_CHUNK;
    // Two pages in each chunk.
    let (batches, cleared) = pass(&pages(universe, (7..universe).step_by(CLEAR_CHUNK as usize / 2)), MAX_RUN, 1);
    assert_eq!((batches.len(), cleared), (1, vec![PageRun::new(0, universe)]));
    let (batches, cleared) = pass(&pages(universe, (0..universe).step_by(2)), MAX_RUN, 2);
    assert_eq!((batches.len() as u64, cleared.len()), (universe / 2 / MAX_RUN, 64));
    for channels in 1..5 {
        for step in [13, 211, 1009] {
            pass(&pages(universe, (step as u64..universe).step_by(step)), 300, channels);
        }
    }
}

#[test]
fn when_nobody_writes_any_more_nothing_is_cleared() {
    let mut outgoing = Outgoing::new(ram(3 * CLEAR_CHUNK));
    outgoing.begin_pass(&pages(3 * CLEAR_CHUNK, [5, 2 * CLEAR_CHUNK]));
    outgoing.stand_still();
    assert_eq!(outgoing.take_chunk_to_clear(), None);
    assert_eq!(outgoing.take_next(9, 1).unwrap(), [PageRun::new(5, 1), PageRun::new(2 * CLEAR_CHUNK, 1)]);
}

#[test]
fn of_huge_pages_whole_ones_are_sent() {
    let host_page = HostPage::HUGE;
    let whole = |number: u64| PageRun::new(number * HUGE_PAGE, HUGE_PAGE);
    let layout = Layout::new(4096, host_page, &[]).unwrap();
    let mut outgoing = Outgoing::new(layout.clone());
    let mut dirty = PageSet::empty(4096);
    for run in [PageRun::new(5, 1), PageRun::new(9, 2), PageRun::new(1535, 2)] {
        dirty.insert(run);
    }
    outgoing.begin_pass(&dirty);
    outgoing.begin_postcopy();
    let missing = outgoing.unsent().clone();
    assert_eq!(missing.runs().collect::<Vec<_>>(), [whole(0), PageRun::new(2 * HUGE_PAGE, 2 * HUGE_PAGE)]);
    outgoing.take_requested(whole(2));
    assert_eq!(outgoing.take_next(HUGE_PAGE, 1), Some(vec![whole(3)]));
    assert_eq!(outgoing.take_next(HUGE_PAGE, 1), Some(vec![whole(0)]));
    assert_eq!(outgoing.take_next(HUGE_PAGE, 1), None);
}

#[test]
fn disks_go_first_in_precopy_and_last_in_postcopy() {
    let layout = Layout::new(2 * CLEAR_CHUNK, HostPage::SMALL, &[40, 1000]).unwrap();
    let storage = layout.pages_of(0).unwrap().first.0;
    let run = PageRun::new;
    let all = [run(5, 1), run(CLEAR_CHUNK + 1, 2), run(storage + 3, 4), run(storage + MAX_RUN, 600)];
    let mut outgoing = Outgoing::new(layout.clone());
    let mut dirty = PageSet::empty(layout.pages());
    all.iter().for_each(|run| {
        dirty.insert(*run);
    });
    outgoing.begin_pass(&dirty);
    assert_eq!(outgoing.unsent_blocks(), 604);
    let mut order = Vec::new();
    loop {
        order.extend(outgoing.take_chunk_to_clear());
        let Some(runs) = outgoing.take_next(MAX_RUN, 1) else { break };
        order.extend(runs);
    }
    let [page, pages, small, large] = all;
    let (first, second) = (run(storage + MAX_RUN, MAX_RUN), run(storage + 2 * MAX_RUN, 88));
    assert_eq!(large.count, first.count + second.count);
    assert_eq!(order, [small, first, second, run(0, 2 * CLEAR_CHUNK), page, pages]);

    outgoing.begin_pass(&dirty);
    outgoing.begin_postcopy();
    // A disk's request leaves RAM its turn.
    outgoing.take_requested(run(storage + MAX_RUN, 10));
    let order: Vec<_> = std::iter::from_fn(|| outgoing.take_next(MAX_RUN, 1)).flatten().collect();
    let rest = run(first.first.0 + 10, MAX_RUN - 10);
    assert_eq!(order, [page, pages, rest, second, small]);
}
