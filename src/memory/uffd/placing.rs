//! Who is placing which pages: a huge page is replaced by one thread while no other places a page of it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::memory::PageRun;

/// A reader-writer lock for each page. Held only over system calls on the same pages, so that a page that somebody waits for is never
/// behind one that nobody does.
#[derive(Debug, Default)]
pub(super) struct Placing {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<Held>,
    /// Threads that wait: seldom any, and then nobody is woken.
    waiting: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    run: PageRun,
    alone: bool,
}

impl Held {
    fn excludes(self, other: Held) -> bool {
        (self.alone || other.alone) && self.run.first.0 < other.run.end() && other.run.first.0 < self.run.end()
    }
}

/// Lets others at the pages when it is dropped.
pub(super) struct Guard<'a> {
    placing: &'a Placing,
    held: Held,
}

impl Placing {
    /// Waits until no other thread replaces a page of `run`; from then on none does.
    pub fn shared(&self, run: PageRun) -> Guard<'_> {
        self.hold(Held { run, alone: false })
    }

    /// Waits until no other thread places a page of `run`; from then on none does.
    pub fn alone(&self, run: PageRun) -> Guard<'_> {
        self.hold(Held { run, alone: true })
    }

    fn hold(&self, new: Held) -> Guard<'_> {
        let mut state = self.state();
        while state.held.iter().any(|held| held.excludes(new)) {
            state.waiting += 1;
            state = self.released.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        state.held.push(new);
        Guard { placing: self, held: new }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let mut state = self.placing.state();
        if let Some(index) = state.held.iter().position(|held| *held == self.held) {
            state.held.swap_remove(index);
        }
        if state.waiting > 0 {
            self.placing.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_pages_exclude_each_other() {
        let held = |first, count, alone| Held { run: PageRun::new(first, count), alone };
        assert!(held(0, 512, true).excludes(held(511, 1, false)));
        assert!(held(511, 1, false).excludes(held(0, 512, true)));
        assert!(!held(0, 512, true).excludes(held(512, 512, true)));
        assert!(!held(0, 512, false).excludes(held(0, 512, false)));
    }

    #[test]
    fn who_is_alone_is_waited_for() {
        let placing = Placing::default();
        let run = PageRun::new(0, 512);
        let other = placing.alone(PageRun::new(512, 512));
        let alone = placing.alone(run);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| drop(placing.shared(PageRun::new(7, 1))));
            drop(placing.shared(PageRun::new(1024, 1)));
            drop(alone);
            waits.join().unwrap();
        });
        drop(other);
        assert!(placing.state().held.is_empty());
    }
}
