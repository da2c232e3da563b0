//! Pages of guest RAM as migration counts them: densely, from the first byte of RAM to the last, holes left out.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Size of a page in bytes: the unit of dirty tracking and of userfaultfd on x86-64.
pub const PAGE_SIZE: usize = 4096;

/// Pages in a huge page of x86-64, which has 2 MiB.
pub const HUGE_PAGE: u64 = 512;

/// A page of guest RAM, counted from 0 without the hole below 4 GiB: not a guest frame number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageNumber(pub u64);

impl PageNumber {
    /// Offset of the page's first byte in RAM, in bytes.
    pub const fn offset(self) -> u64 {
        self.0 * PAGE_SIZE as u64
    }

    /// The page that holds the byte at `offset` of RAM.
    pub const fn containing(offset: u64) -> Self {
        PageNumber(offset / PAGE_SIZE as u64)
    }
}

impl fmt::Display for PageNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// Neighbouring pages, all of them sent, placed or tracked alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRun {
    /// The first page.
    pub first: PageNumber,
    /// How many pages follow one another, the first included.
    pub count: u64,
}

impl PageRun {
    /// A run of `count` pages from page number `first` on.
    pub const fn new(first: u64, count: u64) -> Self {
        PageRun { first: PageNumber(first), count }
    }

    /// One page.
    pub const fn single(page: PageNumber) -> Self {
        PageRun { first: page, count: 1 }
    }

    /// The page number after the last page; saturates, so that runs from outside can be compared before they are checked.
    pub const fn end(self) -> u64 {
        self.first.0.saturating_add(self.count)
    }

    /// Length in bytes; saturates like [`PageRun::end`].
    pub const fn bytes(self) -> u64 {
        self.count.saturating_mul(PAGE_SIZE as u64)
    }

    /// Whether the run has at least one page and lies wholly within the first `pages` pages.
    pub const fn is_within(self, pages: u64) -> bool {
        self.count > 0 && self.count <= pages && self.first.0 <= pages - self.count
    }

    /// The page numbers of the run.
    pub fn pages(self) -> impl Iterator<Item = PageNumber> {
        (self.first.0..self.end()).map(PageNumber)
    }
}

/// How many pages make one of the host's: what the host populates, discards and places at once. A power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct HostPage(u64);

impl HostPage {
    /// The host's pages are the migration's.
    pub const SMALL: Self = HostPage(1);
    /// hugetlb memory.
    pub const HUGE: Self = HostPage(HUGE_PAGE);

    /// A host page of `pages` pages: a power of two, at most a huge page.
    pub const fn new(pages: u64) -> Option<Self> {
        if pages.is_power_of_two() && pages <= HUGE_PAGE { Some(HostPage(pages)) } else { None }
    }

    /// Its size in pages.
    pub const fn pages(self) -> u64 {
        self.0
    }

    /// The host pages that hold the pages of `run`. Saturates like [`PageRun::end`].
    pub const fn around(self, run: PageRun) -> PageRun {
        let first = run.first.0 & !(self.0 - 1);
        PageRun::new(first, run.end().saturating_add(self.0 - 1) / self.0 * self.0 - first)
    }

    /// Whether `run` is made of whole host pages.
    pub const fn divides(self, run: PageRun) -> bool {
        run.first.0.is_multiple_of(self.0) && run.count.is_multiple_of(self.0)
    }
}

impl Default for HostPage {
    fn default() -> Self {
        HostPage::SMALL
    }
}

impl TryFrom<u64> for HostPage {
    type Error = &'static str;

    fn try_from(pages: u64) -> Result<Self, Self::Error> {
        HostPage::new(pages).ok_or("a host page has a number of pages that is a power of two")
    }
}

impl From<HostPage> for u64 {
    fn from(host_page: HostPage) -> Self {
        host_page.0
    }
}

impl fmt::Display for PageRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {:#x}+{}", self.first.0, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_pages_are_whole() {
        assert!(HostPage::new(0).is_none() && HostPage::new(3).is_none() && HostPage::new(1024).is_none());
        let host_page = HostPage::new(8).unwrap();
        assert_eq!(host_page.around(PageRun::new(7, 2)), PageRun::new(0, 16));
        assert_eq!(host_page.around(PageRun::new(16, 8)), PageRun::new(16, 8));
        assert!(host_page.divides(PageRun::new(8, 16)));
        assert!(!host_page.divides(PageRun::new(8, 4)) && !host_page.divides(PageRun::new(4, 8)));
        assert_eq!(HostPage::SMALL.around(PageRun::new(5, 3)), PageRun::new(5, 3));
        // From outside, before it is checked.
        assert!(!host_page.around(PageRun::new(u64::MAX - 2, 3)).is_within(1 << 40));
    }
}
