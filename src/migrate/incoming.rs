//! Which pages are still to come in, and who waits for them.

use std::collections::HashMap;
use std::time::Duration;

use super::layout::Layout;
use super::prefetch::{MAX_AHEAD, Prefetch};
use super::staging::{Gathered, Staging};
use super::wire::MAX_RUN;
use crate::memory::{HostPage, PageNumber, PageRun, PageSet};

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
    staging: Staging,
}

impl Incoming {
    /// The pages in `missing`, whole host pages, are still to come.
    pub fn new(missing: PageSet, layout: Layout) -> Self {
        let requested = PageSet::empty(missing.universe());
        let prefetch = Prefetch::new(layout.ram().count);
        Incoming { requested, missing, since: HashMap::new(), prefetch, staging: Staging::none(), layout }
    }

    /// What is missing of `ranges`, made of huge pages of `unit` pages, comes together elsewhere from now on, as far as that pays.
    pub fn stage(&mut self, unit: HostPage, ranges: &[PageRun]) {
        self.staging = Staging::new(unit, ranges, &self.missing);
    }

    /// As [`Staging::receive`].
    pub fn receive_staged(&mut self, run: PageRun) -> bool {
        self.staging.receive(run)
    }

    /// As [`Staging::received`].
    pub fn received_staged(&mut self, run: PageRun, is_there: bool) {
        self.staging.received(run, is_there, &self.missing);
    }

    /// As [`Staging::zero`].
    pub fn zero_staged(&mut self, run: PageRun) -> Vec<PageRun> {
        // Disks have no huge pages, and may be long.
        if self.layout.is_ram(run.first) { self.staging.zero(run, &self.missing) } else { vec![run] }
    }

    /// A huge page that is to be put in place, and then to be reported with [`Incoming::replaced`].
    pub fn take_gathered(&mut self) -> Option<Gathered> {
        self.staging.take_gathered()
    }

    /// That huge page is in place. Returns as [`Incoming::placed`].
    pub fn replaced(&mut self, run: PageRun, now: Duration) -> Vec<Duration> {
        self.staging.replaced();
        self.placed(run, now)
    }

    /// Whether nothing is missing, or about to be put in place.
    pub fn is_whole(&self) -> bool {
        self.missing.is_empty() && self.staging.is_idle()
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

    /// All has come. What a late reader may say of it changes nothing, and a late fault is on a page that is there.
    pub fn forget_pages(&mut self) {
        self.missing = PageSet::empty(0);
        self.requested = PageSet::empty(0);
        self.staging = Staging::none();
        self.prefetch.forget_pages();
    }

    /// Pages asked for in advance, and how many of them are known to have been touched.
    pub fn prefetched(&self) -> (u64, u64) {
        (self.prefetch.proposed(), self.prefetch.used())
    }

    /// The pages of `run` have been placed. Only now are they no longer missing: a fault between arrival and placement must not be
    /// answered with a zero page. Returns the latency of each fault that this ended.
    pub fn placed(&mut self, run: PageRun, now: Duration) -> Vec<Duration> {
        if self.layout.is_ram(run.first) {
            self.staging.note(run, &self.missing);
        }
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
mod tests;
