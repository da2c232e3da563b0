//! Which pages are still to go out, and which are still to come in.

use std::collections::HashMap;
use std::time::Duration;

use super::layout::Layout;
use super::prefetch::{MAX_AHEAD, Prefetch};
use super::wire::MAX_RUN;
use crate::memory::{HostPage, PageNumber, PageRun, PageSet};

/// Pages whose dirty bits are cleared by one call just before the first of them is sent: 16 MiB. Larger chunks make fewer calls; smaller
/// ones leave less time in which a page is dirtied again before it is sent.
pub const CLEAR_CHUNK: u64 = 4096;
/// What is to be sent within one chunk at the least, if there is as much: where pages lie far apart, a chunk takes in all that lies between
/// them. Sending so many takes longer than a call.
const CLEAR_LEAST: u64 = 512;

const _: () = assert!(CLEAR_CHUNK.is_multiple_of(MAX_RUN));

/// The source's pages that the destination does not hold in their last version.
#[derive(Clone, Debug)]
pub struct Outgoing {
    unsent: PageSet,
    layout: Layout,
    ram: Region,
    storage: Region,
    /// In precopy: what takes longest and changes least, so that RAM is fresh when the pass ends. In postcopy the guest needs RAM more.
    storage_first: bool,
    /// Bits of pages before this one are clear, as far as they are to be sent, or nobody writes any more.
    cleared_to: u64,
}

/// Pages that are sent in the background in their order, RAM or all disks.
#[derive(Clone, Debug)]
struct Region {
    pages: PageRun,
    cursor: u64,
    /// None of those before it is unsent.
    sent_to: u64,
}

impl Region {
    fn new(pages: PageRun) -> Self {
        Region { pages, cursor: pages.first.0, sent_to: pages.first.0 }
    }

    fn rewind(&mut self) {
        *self = Region::new(self.pages);
    }

    /// The next page of `unsent`, behind the cursor or else from the beginning.
    fn next(&mut self, unsent: &PageSet) -> Option<u64> {
        let end = self.pages.end();
        let next = |from: u64| Some(unsent.runs_within(PageRun::new(from, end - from)).next()?.first.0);
        next(self.cursor).or_else(|| {
            let first = next(self.sent_to);
            self.sent_to = first.unwrap_or(end);
            self.cursor = self.sent_to;
            first
        })
    }
}

impl Outgoing {
    /// Nothing to send yet.
    pub fn new(layout: Layout) -> Self {
        Outgoing {
            unsent: PageSet::empty(layout.pages()),
            ram: Region::new(layout.ram()),
            storage: Region::new(layout.storage()),
            storage_first: true,
            cleared_to: 0,
            layout,
        }
    }

    /// Adds freshly dirtied pages and starts from the first page again.
    pub fn begin_pass(&mut self, dirty: &PageSet) {
        self.unsent.union(dirty);
        self.storage_first = true;
        self.cleared_to = 0;
        self.rewind();
    }

    /// After a recovery: what the destination lacks is what is to go, whatever was sent before.
    pub fn restart(&mut self, missing: PageSet) {
        self.unsent = missing;
        self.storage_first = false;
        self.stand_still();
        self.rewind();
    }

    fn rewind(&mut self) {
        self.ram.rewind();
        self.storage.rewind();
    }

    /// The guest stands still, or has gone: no bit needs to be cleared.
    pub fn stand_still(&mut self) {
        self.cleared_to = u64::MAX;
    }

    /// Before the switch to postcopy: RAM goes first from here on, and a host page that is to go in part is to go whole, because it cannot be
    /// there in part.
    pub fn begin_postcopy(&mut self) {
        self.storage_first = false;
        if self.layout.host_page() == HostPage::SMALL {
            // The guest stands still meanwhile.
            return;
        }
        let runs: Vec<_> = self.unsent.runs_within(self.layout.ram()).collect();
        for run in runs {
            self.unsent.insert(self.layout.around(run));
        }
    }

    /// The pages still to go.
    pub fn unsent(&self) -> &PageSet {
        &self.unsent
    }

    /// How many of them are blocks of disks.
    pub fn unsent_blocks(&self) -> u64 {
        self.unsent.runs_within(self.layout.storage()).map(|run| run.count).sum()
    }

    fn next(&mut self) -> Option<u64> {
        let (first, second) = if self.storage_first { (&mut self.storage, &mut self.ram) } else { (&mut self.ram, &mut self.storage) };
        first.next(&self.unsent).or_else(|| second.next(&self.unsent))
    }

    /// Takes the next pages in the background, at most `max`; after a request it goes on behind the requested pages. All of them travel on one
    /// connection of `channels`, which is that of every so many stretches of [`MAX_RUN`] pages, and are all of RAM or of one stretch of a disk.
    /// They lie in what was cleared: no write to a page that is sent with its bit set is ever reported.
    pub fn take_next(&mut self, max: u64, channels: u8) -> Option<Vec<PageRun>> {
        let first = self.next()?;
        let is_ram = self.layout.is_ram(PageNumber(first));
        let end = if is_ram { self.layout.ram().end().min(self.cleared_to).max(first + 1) } else { first + 1 };
        let stretches = (first / MAX_RUN * MAX_RUN..end).step_by(MAX_RUN as usize * usize::from(channels.max(1)));
        let mut runs = Vec::new();
        let mut room = max;
        for stretch in stretches {
            let start = stretch.max(first);
            for run in self.unsent.runs_within(PageRun::new(start, stretch + MAX_RUN - start)) {
                let taken = PageRun { count: run.count.min(room), ..run };
                room -= taken.count;
                runs.extend((taken.count > 0).then_some(taken));
            }
            if room == 0 {
                break;
            }
        }
        for &run in &runs {
            self.take_requested(run);
        }
        if is_ram && channels > 1 {
            // The stretches in between are those of the other connections.
            self.ram.cursor = runs.first()?.end();
        }
        Some(runs)
    }

    /// The chunk whose dirty bits must be cleared before the next run is read, if it was not done in this pass. The bits to clear are
    /// those of [`Outgoing::unsent`] in the chunk: they were harvested, and none of them is sent yet. Bits of disks are clear once harvested.
    pub fn take_chunk_to_clear(&mut self) -> Option<PageRun> {
        let next = self.next()?;
        if next < self.cleared_to || !self.layout.is_ram(PageNumber(next)) {
            return None;
        }
        let first = next / CLEAR_CHUNK * CLEAR_CHUNK;
        let ram = self.layout.ram().end();
        let (mut end, mut pages) = (first, 0);
        while pages < CLEAR_LEAST && end < ram {
            let chunk = PageRun::new(end, CLEAR_CHUNK.min(ram - end));
            pages += self.unsent.runs_within(chunk).map(|run| run.count).sum::<u64>();
            end = chunk.end();
        }
        self.cleared_to = end;
        Some(PageRun::new(first, end - first))
    }

    /// Takes requested pages, which go out at once whether or not they went out before: a page sent in the background may still stand in
    /// a socket's buffer behind many others. The background goes on behind them.
    pub fn take_requested(&mut self, run: PageRun) {
        self.unsent.remove(run);
        let region = if self.layout.is_ram(run.first) { &mut self.ram } else { &mut self.storage };
        region.cursor = run.end();
    }
}

/// What to do about a page fault at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAnswer {
    /// Ask the source for it.
    Request(PageRun),
    /// It was asked for before, perhaps in advance; it will come.
    Wait,
    /// The page is not missing: it is zero and was never sent, or it has been placed since the fault. Place a zero page; where that
    /// finds a page, wake who waits.
    Zero(PageRun),
}

/// The destination's pages that have not been placed.
#[derive(Clone, Debug)]
pub struct Incoming {
    missing: PageSet,
    requested: PageSet,
    /// Since when each page is waited for; of a host page the first.
    since: HashMap<PageNumber, Duration>,
    layout: Layout,
    prefetch: Prefetch,
}

impl Incoming {
    /// The pages in `missing`, whole host pages, are still to come.
    pub fn new(missing: PageSet, layout: Layout) -> Self {
        let requested = PageSet::empty(missing.universe());
        Incoming { requested, missing, since: HashMap::new(), prefetch: Prefetch::new(layout.ram().count), layout }
    }

    /// The pages that have not been placed.
    pub fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// A thread of the guest or of a device touched `page` at `now` and waits.
    pub fn fault(&mut self, page: PageNumber, now: Duration) -> FaultAnswer {
        let run = self.layout.around(PageRun::single(page));
        if !self.missing.contains(page) {
            return FaultAnswer::Zero(run);
        }
        self.since.entry(run.first).or_insert(now);
        if self.requested.insert(run) == 0 { FaultAnswer::Wait } else { FaultAnswer::Request(run) }
    }

    /// A device waits from `now` on for those of `run`, blocks of a disk, that are missing; returns what is to be asked for.
    pub fn wait_for_blocks(&mut self, run: PageRun, now: Duration) -> Vec<PageRun> {
        let missing: Vec<_> = self.missing.runs_within(run).collect();
        let mut unasked: Vec<PageRun> = Vec::new();
        for page in missing.into_iter().flat_map(PageRun::pages) {
            self.since.entry(page).or_insert(now);
            if self.requested.insert(PageRun::single(page)) == 0 {
                continue;
            }
            match unasked.last_mut().filter(|run| run.end() == page.0 && run.count < MAX_RUN) {
                Some(run) => run.count += 1,
                None => unasked.push(PageRun::single(page)),
            }
        }
        unasked
    }

    /// What to ask for in advance, after a fault on `page` that was answered by [`FaultAnswer::Request`] or [`FaultAnswer::Wait`], and after
    /// the request for the page itself. Nothing where host pages are huge: one of them is more than is ever asked for in advance.
    pub fn prefetch(&mut self, page: PageNumber) -> Vec<PageRun> {
        if self.layout.host_page() != HostPage::SMALL {
            return Vec::new();
        }
        // What was requested and nobody waits for was asked for in advance.
        let under_way = self.requested.len().saturating_sub(self.since.len() as u64);
        let can_ask = |page| self.missing.contains(page) && !self.requested.contains(page);
        let runs = self.prefetch.fault(page, MAX_AHEAD.saturating_sub(under_way), can_ask);
        for run in &runs {
            self.requested.insert(*run);
        }
        runs
    }

    /// The pages of `run` come in the background, or are known to be zero. Comes before they are placed.
    pub fn comes_anyway(&mut self, run: PageRun) {
        // Those that were asked for and have been placed came in advance, indeed.
        self.requested.runs_within(run).for_each(|run| self.prefetch.comes_anyway(run));
    }

    /// Pages asked for in advance, and how many of them are known to have been touched.
    pub fn prefetched(&self) -> (u64, u64) {
        (self.prefetch.proposed(), self.prefetch.used())
    }

    /// The pages of `run` have been placed. Only now are they no longer missing: a fault between arrival and placement must not be
    /// answered with a zero page. Returns the latency of each fault that this ended.
    pub fn placed(&mut self, run: PageRun, now: Duration) -> Vec<Duration> {
        self.missing.remove(run);
        if self.requested.remove(run) == 0 {
            return Vec::new();
        }
        run.pages().filter_map(|page| self.since.remove(&page)).map(|since| now.saturating_sub(since)).collect()
    }

    /// The link is another one: what was asked for on the old one and is waited for is asked for again, pages of RAM first.
    pub fn renew(&mut self) -> Vec<PageRun> {
        let all = PageRun::new(0, self.requested.universe());
        self.requested.remove(all);
        self.prefetch.forget_open();
        let (ram, blocks): (Vec<_>, Vec<_>) = self.waiting().into_iter().partition(|page| self.layout.is_ram(*page));
        let mut renewed: Vec<_> = ram.into_iter().map(|page| self.layout.around(PageRun::single(page))).collect();
        for run in &renewed {
            self.requested.insert(*run);
        }
        for block in blocks {
            self.requested.insert(PageRun::single(block));
        }
        let mut rest: Vec<_> = self.requested.runs_within(self.layout.storage()).collect();
        while let Some(run) = rest.pop() {
            let count = run.count.min(MAX_RUN);
            renewed.push(PageRun { count, ..run });
            rest.extend((run.count > count).then(|| PageRun::new(run.first.0 + count, run.count - count)));
        }
        renewed
    }

    /// Since when the one that has waited longest waits.
    pub fn waiting_since(&self) -> Option<Duration> {
        self.since.values().min().copied()
    }

    /// The pages that somebody waits for, longest waiting first.
    pub fn waiting(&self) -> Vec<PageNumber> {
        let mut waiting: Vec<_> = self.since.iter().map(|(page, since)| (*since, *page)).collect();
        waiting.sort();
        waiting.into_iter().map(|(_, page)| page).collect()
    }
}

#[cfg(test)]
mod tests {
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

    fn incoming(missing: PageRun) -> Incoming {
        let mut pages = PageSet::empty(4096);
        pages.insert(missing);
        Incoming::new(pages, ram(4096))
    }

    #[test]
    fn of_huge_pages_whole_ones_are_asked_for_and_sent() {
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
}
