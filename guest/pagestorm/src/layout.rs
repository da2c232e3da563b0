//! Where things are in guest-physical memory, which is mapped one to one.

use core::fmt;

use crate::cmdline::Fill;
use crate::page::PAGE_SIZE;

const PAGE: u64 = PAGE_SIZE as u64;
/// The page tables in the kernel image map this much; the rest needs page directories.
pub const MAPPED_AT_BOOT: u64 = 4 << 30;
/// One page of page directory pointers maps this much; RAM above is not used.
pub const ADDRESS_LIMIT: u64 = 512 << 30;
/// RAM regions that are looked at.
pub const MAX_REGIONS: usize = 8;

/// RAM from `start` to before `end`, in guest-physical bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
}

/// Consecutive pages at consecutive addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Number of the first page.
    pub first_page: u64,
    /// Address of the first page.
    pub gpa: u64,
    /// How many.
    pub pages: u64,
}

/// What is where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Page directories for what is not mapped at boot, one page for each GiB from 4 GiB up.
    pub page_directories: u64,
    /// How many.
    pub page_directory_count: u64,
    /// 32-bit expected generation of each disk block.
    pub blocks: u64,
    /// 32-bit expected generation of each page.
    pub generations: u64,
    /// How many pages there are in all segments.
    pub pages: u64,
    segments: [Segment; MAX_REGIONS],
    segment_count: usize,
}

/// There is less RAM than was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotEnoughRam {
    /// The most that `fill=` can be, in bytes.
    pub most: u64,
}

impl fmt::Display for NotEnoughRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not_enough_ram most={}", self.most)
    }
}

/// RAM not yet given to anything.
struct Free {
    regions: [Region; MAX_REGIONS],
}

impl Free {
    fn pages(&self) -> u64 {
        self.regions
            .iter()
            .map(|region| (region.end - region.start) / PAGE)
            .sum()
    }

    /// Takes consecutive pages below `limit`.
    fn take(&mut self, pages: u64, limit: u64) -> Option<u64> {
        let bytes = pages.checked_mul(PAGE)?;
        let fits =
            |region: &&mut Region| region.end.min(limit).saturating_sub(region.start) >= bytes;
        let region = self.regions.iter_mut().find(fits)?;
        let gpa = region.start;
        region.start += bytes;
        Some(gpa)
    }
}

impl Layout {
    /// Gives away the RAM in `ram` (in ascending order) from `kernel_end` on, first to tables, then to pages.
    /// `disk_blocks` is how many blocks' generations are kept.
    ///
    /// # Errors
    /// [`NotEnoughRam`] if the tables or the pages asked for do not fit.
    pub fn plan(
        ram: &[Region],
        kernel_end: u64,
        fill: Fill,
        disk_blocks: u64,
    ) -> Result<Self, NotEnoughRam> {
        let mut free = Free {
            regions: [Region::default(); MAX_REGIONS],
        };
        for (usable, region) in free.regions.iter_mut().zip(ram) {
            let start = region
                .start
                .max(kernel_end)
                .div_ceil(PAGE)
                .saturating_mul(PAGE);
            let end = region.end.min(ADDRESS_LIMIT) / PAGE * PAGE;
            *usable = Region {
                start: start.min(end),
                end,
            };
        }
        let none = NotEnoughRam { most: 0 };
        let top = free
            .regions
            .iter()
            .map(|region| region.end)
            .max()
            .unwrap_or(0);
        let page_directory_count = top.saturating_sub(MAPPED_AT_BOOT).div_ceil(1 << 30);
        let page_directories = free
            .take(page_directory_count, MAPPED_AT_BOOT)
            .ok_or(none)?;
        let blocks = free
            .take((disk_blocks * 4).div_ceil(PAGE), u64::MAX)
            .ok_or(none)?;

        // Each page of the table serves as many pages as it has entries.
        let entries = PAGE / 4;
        let most = free.pages() - free.pages().div_ceil(entries + 1);
        let pages = match fill {
            Fill::All => most,
            Fill::Pages(pages) => pages,
        };
        let short = NotEnoughRam { most: most * PAGE };
        if pages > most {
            return Err(short);
        }
        let generations = free.take(pages.div_ceil(entries), u64::MAX).ok_or(short)?;

        let mut layout = Layout {
            page_directories,
            page_directory_count,
            blocks,
            generations,
            pages,
            segments: [Segment::default(); MAX_REGIONS],
            segment_count: 0,
        };
        let mut first_page = 0;
        for region in free.regions {
            let pages = ((region.end - region.start) / PAGE).min(layout.pages - first_page);
            if pages > 0 {
                layout.segments[layout.segment_count] = Segment {
                    first_page,
                    gpa: region.start,
                    pages,
                };
                layout.segment_count += 1;
                first_page += pages;
            }
        }
        Ok(layout)
    }

    /// Where the pages are, in order of their numbers.
    pub fn segments(&self) -> &[Segment] {
        &self.segments[..self.segment_count]
    }

    /// The address of a page; None if there is no such page.
    #[inline]
    pub fn gpa(&self, page: u64) -> Option<u64> {
        let holds = |segment: &&Segment| page.wrapping_sub(segment.first_page) < segment.pages;
        let segment = self.segments().iter().find(holds)?;
        Some(segment.gpa + (page - segment.first_page) * PAGE)
    }
}

#[cfg(test)]
mod tests;
