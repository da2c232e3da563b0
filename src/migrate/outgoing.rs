//! Which pages are still to go out, and in what order.

use super::layout::Layout;
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
    /// The stretch that was sent from last. It is sent to its end, because a huge page that has come in part cannot be put
    /// in place.
    begun: Option<PageRun>,
    /// The first page of the stretch of which pages were requested last: its other pages are likely to be needed next.
    wished: Option<u64>,
}

impl Region {
    fn new(pages: PageRun) -> Self {
        Region { pages, cursor: pages.first.0, sent_to: pages.first.0, begun: None, wished: None }
    }

    fn rewind(&mut self) {
        *self = Region::new(self.pages);
    }

    /// The stretch of [`MAX_RUN`] pages that `page` lies in, as far as it is of this region.
    fn stretch(&self, page: PageNumber) -> PageRun {
        let first = page.0 / MAX_RUN * MAX_RUN;
        let (start, end) = (first.max(self.pages.first.0), (first + MAX_RUN).min(self.pages.end()));
        PageRun::new(start, end.saturating_sub(start))
    }

    /// The next page of `unsent`: of the stretch that was begun, then from the one that was wished for on, or behind the cursor, or else from
    /// the beginning.
    fn next(&mut self, unsent: &PageSet) -> Option<u64> {
        let end = self.pages.end();
        if let Some(stretch) = self.begun {
            if let Some(run) = unsent.runs_within(stretch).next() {
                return Some(run.first.0);
            }
            self.begun = None;
        }
        self.cursor = self.wished.take().unwrap_or(self.cursor);
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

    fn region(&mut self, page: PageNumber) -> &mut Region {
        if self.layout.is_ram(page) { &mut self.ram } else { &mut self.storage }
    }

    fn next(&mut self) -> Option<u64> {
        let (first, second) = if self.storage_first { (&mut self.storage, &mut self.ram) } else { (&mut self.ram, &mut self.storage) };
        first.next(&self.unsent).or_else(|| second.next(&self.unsent))
    }

    /// Takes the next pages in the background, at most `max`. All of them travel on one
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
            self.unsent.remove(run);
        }
        // Between those of several runs may lie stretches of other connections.
        let (first, last) = (runs.first()?, if channels > 1 { runs.first()? } else { runs.last()? });
        let region = self.region(first.first);
        region.begun = Some(region.stretch(last.first));
        region.cursor = last.end();
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

    /// Takes pages that go out by another way.
    pub fn take(&mut self, run: PageRun) {
        self.unsent.remove(run);
    }

    /// Takes requested pages, which go out at once whether or not they went out before: a page sent in the background may still stand in
    /// a socket's buffer behind many others. The background goes on with their neighbours.
    pub fn take_requested(&mut self, run: PageRun) {
        self.unsent.remove(run);
        let region = self.region(run.first);
        region.wished = Some(region.stretch(run.first).first.0);
    }
}

#[cfg(test)]
mod tests;
