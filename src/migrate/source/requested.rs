//! What the destination waits for, in the order in which it is sent: pages of RAM, then blocks of disks a few at a time, so that the next page
//! that somebody touches does not wait for them either.

use std::collections::VecDeque;

use super::{Source, State};
use crate::memory::PageRun;
use crate::migrate::wire::MAX_RUN;

/// Blocks that go at a time: 64 KiB.
const BLOCKS_AT_A_TIME: u64 = 16;
/// Requests that may wait here: more than the guest's threads can make.
const MAX_REQUESTS: usize = 1 << 16;

/// Requests that have not been answered.
#[derive(Clone, Debug, Default)]
pub(super) struct Requested {
    pages: VecDeque<PageRun>,
    blocks: VecDeque<PageRun>,
}

impl Requested {
    /// Adds a request; false if there are too many.
    pub(super) fn insert(&mut self, run: PageRun, is_ram: bool) -> bool {
        let queue = if is_ram { &mut self.pages } else { &mut self.blocks };
        queue.push_back(run);
        queue.len() <= MAX_REQUESTS
    }

    /// What is to be sent next.
    pub(super) fn take_next(&mut self) -> Option<PageRun> {
        if let Some(pages) = self.pages.pop_front() {
            return Some(pages);
        }
        let run = self.blocks.pop_front()?;
        let count = run.count.min(BLOCKS_AT_A_TIME);
        if run.count > count {
            self.blocks.push_front(PageRun::new(run.first.0 + count, run.count - count));
        }
        Some(PageRun { count, ..run })
    }

    /// They came on a link that is lost.
    pub(super) fn clear(&mut self) {
        self.pages.clear();
        self.blocks.clear();
    }
}

impl Source {
    /// The destination asks for pages on the urgent connection. What [`Source::next_requested`] says is to be sent there at once. An error is the
    /// destination's fault and ends what can be ended.
    pub fn request(&mut self, run: PageRun) -> Result<(), String> {
        if !matches!(self.state, State::Switching | State::Committed | State::Ending) || !self.switch_postcopy {
            return Err(format!("the destination asked for {run}, but there is no postcopy"));
        }
        let layout = &self.config.layout;
        if !layout.holds(run) || run.count > MAX_RUN || !layout.divides(run) {
            return Err(format!("the destination asked for {run} of {} pages", layout.pages()));
        }
        self.outgoing.take_requested(run);
        if !self.requested.insert(run, layout.is_ram(run.first)) {
            return Err("the destination asks for more than it may at a time".into());
        }
        self.requests += 1;
        Ok(())
    }

    /// What is to be sent next on the urgent connection, and then reported with [`Source::sent_urgent`]: pages first.
    pub fn next_requested(&mut self) -> Option<PageRun> {
        self.requested.take_next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_overtake_blocks() {
        let mut requested = Requested::default();
        let run = PageRun::new;
        assert!(requested.insert(run(1000, 40), false) && requested.insert(run(2000, 1), false));
        assert_eq!(requested.take_next(), Some(run(1000, 16)));
        assert!(requested.insert(run(5, 1), true) && requested.insert(run(3, 2), true));
        let order: Vec<_> = std::iter::from_fn(|| requested.take_next()).collect();
        assert_eq!(order, [run(5, 1), run(3, 2), run(1016, 16), run(1032, 8), run(2000, 1)]);
    }
}
