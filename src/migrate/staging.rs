//! Huge pages that come together outside guest RAM in postcopy, and are put in place whole: placing 512 small pages one by one takes longer,
//! and leaves the guest without the huge pages that it had.

use std::collections::HashMap;

use crate::memory::{HostPage, PageNumber, PageRun, PageSet};

/// A huge page of which every missing page has come, or has been placed by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gathered {
    /// To be put in place from where it came together. What is in guest RAM already may have been written since and takes precedence.
    Contents(PageRun),
    /// Nothing but zeros has come.
    Zero(PageRun),
}

/// Which huge pages come together, and how far they are.
#[derive(Clone, Debug)]
pub struct Staging {
    unit: HostPage,
    gathering: HashMap<PageNumber, Gathering>,
    /// Pages that have come, or have been placed by themselves.
    here: PageSet,
    gathered: Vec<Gathered>,
    /// Taken, and not reported to be in place.
    taken: u32,
}

#[derive(Clone, Copy, Debug)]
struct Gathering {
    /// Pages that are not `here`, of those that were missing.
    left: u64,
    /// Frames that readers are putting there. Until they have ended nothing is taken from there: one that came on a link that was lost could
    /// otherwise overwrite what the guest has written.
    receiving: u32,
    has_contents: bool,
}

impl Staging {
    /// Nothing comes together.
    pub fn none() -> Self {
        Staging { unit: HostPage::HUGE, gathering: HashMap::new(), here: PageSet::empty(0), gathered: Vec::new(), taken: 0 }
    }

    /// The pages of `ranges`, of `unit` pages each, come together, unless less than half of one is missing: for those it does not pay.
    pub fn new(unit: HostPage, ranges: &[PageRun], missing: &PageSet) -> Self {
        let firsts = ranges.iter().flat_map(|range| (range.first.0..range.end()).step_by(unit.pages() as usize));
        let gathering = firsts.filter_map(|first| {
            let left: u64 = missing.runs_within(PageRun::new(first, unit.pages())).map(|run| run.count).sum();
            let gathering = Gathering { left, receiving: 0, has_contents: false };
            (left * 2 >= unit.pages()).then_some((PageNumber(first), gathering))
        });
        Staging { unit, gathering: gathering.collect(), here: PageSet::empty(missing.universe()), gathered: Vec::new(), taken: 0 }
    }

    /// Whether the contents of `run` are to be put where its huge page comes together; then [`Staging::received`] must follow.
    pub fn receive(&mut self, run: PageRun) -> bool {
        let unit = self.unit.around(run);
        let gathering = self.gathering.get_mut(&unit.first).filter(|_| unit.count == self.unit.pages());
        gathering.map(|gathering| gathering.receiving += 1).is_some()
    }

    /// What was begun by [`Staging::receive`] is over: the pages of `run` are there, or not.
    pub fn received(&mut self, run: PageRun, is_there: bool, missing: &PageSet) {
        let unit = self.unit.around(run);
        if let Some(gathering) = self.gathering.get_mut(&unit.first) {
            gathering.receiving = gathering.receiving.saturating_sub(1);
            gathering.has_contents |= is_there;
        }
        self.note(if is_there { run } else { PageRun::new(run.first.0, 0) }, missing);
    }

    /// The pages of `run` are zero. Returns those of which the huge page does not come together.
    pub fn zero(&mut self, run: PageRun, missing: &PageSet) -> Vec<PageRun> {
        if self.gathering.is_empty() {
            return vec![run];
        }
        let mut others = Vec::new();
        for part in self.parts(run) {
            match self.gathering.contains_key(&self.unit.around(part).first) {
                true => self.note(part, missing),
                false => others.push(part),
            }
        }
        others
    }

    /// The pages of `run` have come or been placed, of which those in `missing` were missing up to now.
    pub fn note(&mut self, run: PageRun, missing: &PageSet) {
        if self.gathering.is_empty() {
            return;
        }
        for part in self.parts(run) {
            // An empty run has a place, too.
            let unit = self.unit.around(PageRun::single(part.first));
            let Some(gathering) = self.gathering.get_mut(&unit.first) else { continue };
            gathering.left -= missing.runs_within(part).map(|run| self.here.insert(run)).sum::<u64>().min(gathering.left);
            let Gathering { left, receiving, has_contents } = *gathering;
            if left == 0 && receiving == 0 {
                self.gathering.remove(&unit.first);
                self.gathered.push(if has_contents { Gathered::Contents(unit) } else { Gathered::Zero(unit) });
            }
        }
    }

    /// A huge page that has come together; it is the caller's to put it in place and report it with [`Staging::replaced`].
    pub fn take_gathered(&mut self) -> Option<Gathered> {
        let gathered = self.gathered.pop()?;
        self.taken += 1;
        Some(gathered)
    }

    /// One that was taken is in place.
    pub fn replaced(&mut self) {
        self.taken = self.taken.saturating_sub(1);
    }

    /// Whether nothing comes together, or waits to be put in place. Until then the watch over RAM must go on, even if no page is missing: while
    /// a huge page is put in place, what the guest has of it is not there.
    pub fn is_idle(&self) -> bool {
        self.gathering.is_empty() && self.gathered.is_empty() && self.taken == 0
    }

    /// `run` cut at the borders of huge pages. An empty one counts as a part of its huge page.
    fn parts(&self, run: PageRun) -> impl Iterator<Item = PageRun> + use<> {
        let (unit, mut next) = (self.unit, Some(run.first.0));
        std::iter::from_fn(move || {
            let first = next?;
            let end = run.end().min(unit.around(PageRun::new(first, 1)).end());
            next = (end < run.end()).then_some(end);
            Some(PageRun::new(first, end - first))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun::new(first, count)
    }

    fn set(runs: &[PageRun]) -> PageSet {
        let mut set = PageSet::empty(64);
        runs.iter().for_each(|run| {
            set.insert(*run);
        });
        set
    }

    /// Huge pages of 8: of the first everything is missing, of the second a half, of the third less.
    fn staging() -> (Staging, PageSet) {
        let missing = set(&[run(0, 12), run(16, 3)]);
        (Staging::new(HostPage::new(8).unwrap(), &[run(0, 24)], &missing), missing)
    }

    #[test]
    fn a_huge_page_is_put_in_place_when_all_of_it_has_come_or_been_placed() {
        let (mut staging, missing) = staging();
        assert!(staging.receive(run(0, 5)));
        staging.received(run(0, 5), true, &missing);
        staging.note(run(6, 1), &missing);
        // What was placed by itself may come once more.
        assert!(staging.receive(run(5, 2)));
        assert_eq!(staging.take_gathered(), None);
        staging.received(run(5, 2), true, &missing);
        assert_eq!(staging.take_gathered(), None);
        assert_eq!(staging.zero(run(7, 1), &missing), []);
        assert_eq!(staging.take_gathered(), Some(Gathered::Contents(run(0, 8))));
        assert!(!staging.receive(run(3, 1)), "it is about to be in place");
        staging.note(run(8, 4), &missing);
        assert_eq!(staging.take_gathered(), Some(Gathered::Zero(run(8, 8))));
        assert_eq!(staging.take_gathered(), None);
        staging.replaced();
        assert!(!staging.is_idle());
        staging.replaced();
        assert!(staging.is_idle());
    }

    #[test]
    fn what_comes_elsewhere_is_placed_by_itself() {
        let (mut staging, missing) = staging();
        assert!(!staging.receive(run(16, 3)), "too little of it is missing");
        assert!(!staging.receive(run(7, 2)), "the parts of two huge pages");
        assert_eq!(staging.zero(run(10, 20), &missing), [run(16, 8), run(24, 6)]);
        assert_eq!(staging.take_gathered(), None);
        staging.note(run(0, 10), &missing);
        // Nothing came together: what was placed by itself stays.
        assert_eq!([staging.take_gathered(), staging.take_gathered()], [Some(Gathered::Zero(run(8, 8))), Some(Gathered::Zero(run(0, 8)))]);
        assert!(!Staging::none().receive(run(0, 1)));
    }

    #[test]
    fn nothing_is_taken_while_a_frame_is_on_its_way_there() {
        let (mut staging, missing) = staging();
        assert!(staging.receive(run(0, 1)) && staging.receive(run(0, 8)));
        staging.received(run(0, 8), true, &missing);
        assert_eq!(staging.take_gathered(), None);
        staging.received(run(0, 1), false, &missing);
        assert_eq!(staging.take_gathered(), Some(Gathered::Contents(run(0, 8))));
    }
}
