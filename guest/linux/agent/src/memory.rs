//! Dirties memory at a given rate and checks all of it, over and over.

use std::hint::black_box;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use crate::pattern::{Page, PAGE_SIZE};
use crate::report::{failure, PAGES_CHECKED, PAGES_DIRTIED};
use crate::stop::stopping;

/// One thread's share of the memory.
pub struct Slab {
    /// Distinguishes this slab's pages from the others': the upper half of every page's number.
    number: u64,
    pages: usize,
    /// Between two pages that are dirtied; zero for none.
    interval: Duration,
}

/// Shares `mib` MiB, dirtied at `rate` pages a second (0: as fast as possible), out to `threads` threads.
pub fn slabs(mib: usize, threads: usize, rate: u64) -> Vec<Slab> {
    let pages = mib * (1 << 20) / PAGE_SIZE / threads;
    let interval = match rate {
        0 => Duration::ZERO,
        rate => Duration::from_secs(1) * threads as u32 / rate as u32,
    };
    let slab = |number| Slab {
        number,
        pages,
        interval,
    };
    if pages == 0 {
        return Vec::new();
    }
    (0..threads as u64).map(slab).collect()
}

impl Slab {
    fn page_number(&self, index: usize) -> u64 {
        self.number << 32 | index as u64
    }

    /// Works until asked to stop, then checks every page a last time. Ends early at a page that is wrong.
    pub fn run(self) {
        if let Err(error) = self.work() {
            failure("memory", &error);
        }
    }

    fn work(&self) -> Result<(), String> {
        let filled = |index| {
            let mut page = Page::ZERO;
            page.fill(self.page_number(index), 1);
            PAGES_DIRTIED.fetch_add(1, Relaxed);
            page
        };
        let mut pages: Vec<Page> = (0..self.pages).map(filled).collect();
        let mut generations = vec![1_u32; self.pages];

        let check = |pages: &[Page], generations: &[u32], index: usize| {
            // The compiler must not carry over what it knows of the page from when it was written.
            let page = black_box(&pages[index]);
            PAGES_CHECKED.fetch_add(1, Relaxed);
            page.check(self.page_number(index), u64::from(generations[index]))
        };

        let mut random = self.number + 1;
        let mut sweep = 0;
        let mut due = Instant::now();
        while !stopping() {
            // One page anywhere is dirtied, and one in turn is only read, so that all are seen.
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let index = (random >> 33) as usize % self.pages;
            check(&pages, &generations, index)?;
            generations[index] = generations[index].wrapping_add(1);
            pages[index].fill(self.page_number(index), u64::from(generations[index]));
            PAGES_DIRTIED.fetch_add(1, Relaxed);
            check(&pages, &generations, sweep)?;
            sweep = (sweep + 1) % self.pages;

            due += self.interval;
            let now = Instant::now();
            // Short waits are saved up: waking for every page would cost more than the page.
            if due > now + Duration::from_millis(1) {
                thread::sleep(due - now);
            }
            // After a pause of the guest there is nothing to catch up on.
            due = due.max(now.checked_sub(Duration::from_millis(100)).unwrap_or(now));
        }
        (0..self.pages).try_for_each(|index| check(&pages, &generations, index))
    }
}
