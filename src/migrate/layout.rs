//! What a migration's page numbers stand for: the pages of RAM, and behind them the blocks of the disks that are copied. So all that is done
//! with sets of pages (passes, the missing ones, requests, recovery, the last account) is done with RAM and disks as one.

use super::wire::MAX_RUN;
use crate::block::block_run::BlockRun;
use crate::memory::{HostPage, PageNumber, PageRun};

/// Most blocks of all disks together: 64 TiB, for which a set of pages takes 2 GiB.
const MAX_BLOCKS: u64 = 1 << 34;
/// Longest guest RAM, in pages: what a 48-bit physical address space can hold.
const MAX_RAM_PAGES: u64 = 1 << 36;

/// How pages are numbered. By default there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    ram_pages: u64,
    host_page: HostPage,
    /// One for each disk of the guest that is copied; each begins at a multiple of [`MAX_RUN`], as runs that travel together do.
    disks: Vec<DiskPages>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DiskPages {
    /// Index of the disk in the guest's configuration.
    disk: usize,
    pages: PageRun,
}

/// What some neighbouring pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Pages of RAM.
    Ram(PageRun),
    /// Blocks of the disk with this index in the guest's configuration. The last one of a disk may reach beyond its end, and is zero there.
    Disk(usize, BlockRun),
}

impl Layout {
    /// RAM of `ram_pages` pages, which are made of `host_page`s, and of each disk so many blocks: none of a disk that is not copied. An error
    /// where that is too much, or makes no sense.
    pub fn new(ram_pages: u64, host_page: HostPage, blocks: &[u64]) -> Result<Self, String> {
        if ram_pages == 0 || ram_pages > MAX_RAM_PAGES || !host_page.divides(PageRun::new(0, ram_pages)) {
            return Err(format!("a guest of {ram_pages} pages of RAM cannot be moved"));
        }
        if blocks.iter().try_fold(0u64, |sum, count| sum.checked_add(*count)).is_none_or(|sum| sum > MAX_BLOCKS) {
            return Err("disks of more than 64 TiB in all cannot be copied".into());
        }
        let mut end = ram_pages;
        let mut disks = Vec::new();
        for (disk, &count) in blocks.iter().enumerate().filter(|(_, count)| **count > 0) {
            // At least one number is left out, so that no run of a set reaches from RAM into a disk or from one disk into the next.
            let pages = PageRun::new((end + 1).next_multiple_of(MAX_RUN), count);
            disks.push(DiskPages { disk, pages });
            end = pages.end();
        }
        Ok(Layout { ram_pages, host_page, disks })
    }

    /// How many page numbers there are, those between the disks, which mean nothing, included.
    pub fn pages(&self) -> u64 {
        self.disks.last().map_or(self.ram_pages, |last| last.pages.end())
    }

    /// The pages of RAM.
    pub fn ram(&self) -> PageRun {
        PageRun::new(0, self.ram_pages)
    }

    /// What RAM is made of.
    pub fn host_page(&self) -> HostPage {
        self.host_page
    }

    /// From the first page behind RAM to the last: empty where no disk is copied.
    pub fn storage(&self) -> PageRun {
        PageRun::new(self.ram_pages, self.pages() - self.ram_pages)
    }

    /// Whether disks are copied.
    pub fn has_disks(&self) -> bool {
        !self.disks.is_empty()
    }

    /// How many blocks the disks that are copied have.
    pub fn blocks(&self) -> u64 {
        self.disks.iter().map(|disk| disk.pages.count).sum()
    }

    /// The blocks of each disk of a guest with so many disks, as [`Layout::new`] takes them.
    pub fn blocks_of_disks(&self) -> Vec<u64> {
        let mut blocks = vec![0; self.disks.last().map_or(0, |last| last.disk + 1)];
        for disk in &self.disks {
            if let Some(count) = blocks.get_mut(disk.disk) {
                *count = disk.pages.count;
            }
        }
        blocks
    }

    /// What the pages of `run` are; nothing if some of them mean nothing, or they are not all of RAM or of one disk.
    pub fn place(&self, run: PageRun) -> Option<Place> {
        if run.is_within(self.ram_pages) {
            return Some(Place::Ram(run));
        }
        let at = self.disks.partition_point(|disk| disk.pages.end() <= run.first.0);
        let DiskPages { disk, pages } = *self.disks.get(at)?;
        let first = run.first.0.checked_sub(pages.first.0)?;
        let is_within = PageRun::new(first, run.count).is_within(pages.count);
        is_within.then_some(Place::Disk(disk, BlockRun::new(first, run.count)))
    }

    /// Whether the pages of `run` are all of RAM or all of one disk.
    pub fn holds(&self, run: PageRun) -> bool {
        self.place(run).is_some()
    }

    /// The pages of `run` that are there or not there together with those of `run`.
    pub fn around(&self, run: PageRun) -> PageRun {
        if self.is_ram(run.first) { self.host_page.around(run) } else { run }
    }

    /// Whether what is there or not there together is wholly in `run` or not at all.
    pub fn divides(&self, run: PageRun) -> bool {
        !self.is_ram(run.first) || self.host_page.divides(run)
    }

    /// Whether `page` is one of RAM.
    pub fn is_ram(&self, page: PageNumber) -> bool {
        page.0 < self.ram_pages
    }

    /// The pages of the disk with this index in the guest's configuration, if it is copied.
    pub fn pages_of(&self, disk: usize) -> Option<PageRun> {
        self.disks.iter().find(|pages| pages.disk == disk).map(|disk| disk.pages)
    }

    /// The indices of the disks that are copied, and their pages.
    pub fn disks(&self) -> impl Iterator<Item = (usize, PageRun)> {
        self.disks.iter().map(|disk| (disk.disk, disk.pages))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_begin_behind_ram_where_runs_do() {
        let layout = Layout::new(100, HostPage::SMALL, &[0, 600, 0, 10]).unwrap();
        assert_eq!((layout.pages(), layout.blocks()), (1546, 610));
        assert_eq!(layout.blocks_of_disks(), [0, 600, 0, 10]);
        assert_eq!(layout.place(PageRun::new(90, 10)), Some(Place::Ram(PageRun::new(90, 10))));
        assert_eq!(layout.place(PageRun::new(1024, 88)), Some(Place::Disk(1, BlockRun::new(512, 88))));
        assert_eq!(layout.place(PageRun::new(1536, 10)), Some(Place::Disk(3, BlockRun::new(0, 10))));
        assert_eq!([0, 1].map(|disk| layout.pages_of(disk)), [None, Some(PageRun::new(512, 600))]);
        for nothing in [(90, 11), (100, 1), (511, 2), (1024, 89), (1112, 1), (1500, 40), (1536, 11), (1546, 1), (u64::MAX, 2), (5, 0)] {
            assert!(!layout.holds(PageRun::new(nothing.0, nothing.1)), "{nothing:?}");
        }
    }

    #[test]
    fn blocks_are_there_one_by_one() {
        let layout = Layout::new(1024, HostPage::HUGE, &[600]).unwrap();
        assert_eq!(layout.around(PageRun::new(3, 1)), PageRun::new(0, 512));
        assert_eq!(layout.around(PageRun::new(1027, 1)), PageRun::new(1027, 1));
        assert!(layout.divides(PageRun::new(1027, 1)) && !layout.divides(PageRun::new(3, 1)));
    }

    #[test]
    fn what_is_too_much_is_refused() {
        assert!(Layout::new(0, HostPage::SMALL, &[]).is_err());
        assert!(Layout::new(MAX_RAM_PAGES + 1, HostPage::SMALL, &[]).is_err());
        assert!(Layout::new(100, HostPage::HUGE, &[]).is_err());
        assert!(Layout::new(1, HostPage::SMALL, &[MAX_BLOCKS, 1]).is_err());
        assert!(Layout::new(1, HostPage::SMALL, &[u64::MAX, 2]).is_err());
        assert!(Layout::new(MAX_RAM_PAGES, HostPage::SMALL, &[MAX_BLOCKS]).is_ok());
    }
}
