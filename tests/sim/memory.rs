//! Guest RAM of the model, and its disk behind it: each page is the number of the last write to it. Version 0 is a page of zeros.

use ferry::memory::{HostPage, PageNumber, PageRun, PageSet};
use ferry::migrate::layout::Layout;

/// Pages in a huge page of the model.
pub const HUGE: u64 = 8;

/// Contents of a page.
pub type Version = u32;

/// One host's copy of RAM, with the kernel's dirty log under manual protection, and of a disk, whose changed blocks are taken with each look.
pub struct Ram {
    layout: Layout,
    changed: PageSet,
    pages: Vec<Option<Version>>,
    log: PageSet,
    /// Pages of the log that were harvested and not cleared: a write to one of them is not seen, as its bit is set already.
    reported: PageSet,
    touched: PageSet,
}

impl Ram {
    /// RAM in which no page is populated, and a disk that is a hole.
    pub fn new(layout: Layout) -> Self {
        let pages = layout.pages();
        Ram {
            layout,
            changed: PageSet::empty(pages),
            pages: vec![None; pages as usize],
            log: PageSet::empty(pages),
            reported: PageSet::empty(pages),
            touched: PageSet::empty(pages),
        }
    }

    /// What a reader finds, a page that is not populated being zero.
    pub fn read(&self, page: PageNumber) -> Version {
        self.pages[page.0 as usize].unwrap_or(0)
    }

    pub fn is_populated(&self, page: PageNumber) -> bool {
        self.pages[page.0 as usize].is_some()
    }

    pub fn write(&mut self, page: PageNumber, version: Version) {
        if !self.layout.is_ram(page) {
            self.changed.insert(PageRun::single(page));
            return self.place(page, version);
        }
        let whole = self.populate(page, self.layout.host_page());
        self.pages[page.0 as usize] = Some(version);
        self.log.insert(PageRun::single(page));
        self.touched.insert(whole);
    }

    /// Places contents without a trace in the log, as userfaultfd does.
    pub fn place(&mut self, page: PageNumber, version: Version) {
        self.pages[page.0 as usize] = Some(version);
        self.touched.insert(PageRun::single(page));
    }

    /// Writes into ordinary memory, as a receiver of precopy does: a transparent huge page comes into being, its other pages zero.
    pub fn fill(&mut self, page: PageNumber, version: Version) {
        if self.layout.is_ram(page) {
            self.populate(page, HostPage::new(HUGE).unwrap());
        }
        self.place(page, version);
    }

    /// Fills what is missing of the host page of `page` with zeros.
    fn populate(&mut self, page: PageNumber, host_page: HostPage) -> PageRun {
        let whole = host_page.around(PageRun::single(page));
        let end = whole.end().min(self.layout.ram().end()) as usize;
        for neighbour in &mut self.pages[whole.first.0 as usize..end] {
            neighbour.get_or_insert(0);
        }
        whole
    }

    /// Nothing is there of `run`, which the kernel takes in whole host pages only.
    pub fn discard(&mut self, run: PageRun) {
        assert!(self.layout.divides(run), "{run} cannot be discarded");
        for page in run.pages() {
            self.pages[page.0 as usize] = None;
        }
    }

    /// Makes `page`, which holds something, zero.
    pub fn empty(&mut self, page: PageNumber) {
        let is_whole = self.layout.around(PageRun::single(page)).count == 1;
        self.pages[page.0 as usize] = if is_whole { None } else { Some(0) };
    }

    /// From now on a block that is not there is missing: those that nobody expects are holes.
    pub fn expect(&mut self, missing: &[PageRun]) {
        for page in self.layout.storage().pages() {
            self.pages[page.0 as usize].get_or_insert(0);
        }
        missing.iter().for_each(|run| self.discard(*run));
    }

    /// Starts the log; returns the pages that have ever been touched.
    pub fn start_log(&mut self) -> PageSet {
        self.log = self.touched.clone();
        self.reported = self.touched.clone();
        self.changed = PageSet::empty(self.layout.pages());
        self.touched.clone()
    }

    /// What has come into the log since the last harvest; reading it clears nothing.
    pub fn harvest(&mut self) -> PageSet {
        let mut fresh = self.log.clone();
        fresh.subtract(&self.reported);
        self.reported = self.log.clone();
        fresh.union(&std::mem::replace(&mut self.changed, PageSet::empty(self.layout.pages())));
        fresh
    }

    /// Clears what was harvested of `range`.
    pub fn clear(&mut self, harvested: &PageSet, range: PageRun) {
        for run in harvested.runs_within(range) {
            self.log.remove(run);
            self.reported.remove(run);
        }
    }
}
