//! A disk whose blocks arrive with a migration: what userfaultfd is for RAM.
//!
//! Before the switch whatever comes is written. Afterwards some blocks are missing. The guest waits for those that it reads, or writes in
//! part, and asks for them. A missing block is written only by who has claimed it, and is there once that has succeeded: a block that the
//! guest writes as a whole is the guest's from then on, and what arrives for it later is dropped. A write that fails leaves it missing.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use super::block_run::{BlockRun, COPY_BLOCK};
use super::image::LockedImage;
use crate::memory::{PageRun, PageSet};

/// How many blocks are asked for at once, at most.
pub const MAX_ASKED: u64 = 512;

/// Which blocks of a disk are there, shared by the disk and whoever brings its blocks.
pub struct Arriving {
    disk_size: u64,
    /// The disk's, which alone decides when the image is given up.
    image: Weak<LockedImage>,
    /// Nothing is missing, and nothing will be.
    complete: AtomicBool,
    state: Mutex<State>,
    /// A claim has ended, something is expected, or nothing more comes.
    news: Condvar,
}

#[derive(Default)]
struct State {
    /// Nothing before [`Arriving::expect`]: any block may be missing.
    expected: Option<Expected>,
    /// Being written, by an arrival or by the guest. No two of them overlap, and who waits has none.
    claimed: Vec<BlockRun>,
    abandoned: Option<String>,
}

struct Expected {
    /// Blocks as pages of a RAM of the disk's size.
    missing: PageSet,
    on_missing: Arc<dyn Fn(BlockRun) + Send + Sync>,
}

impl State {
    fn missing(&self, run: BlockRun) -> Vec<BlockRun> {
        match &self.expected {
            None if run.count == 0 => Vec::new(),
            None => vec![run],
            Some(expected) => {
                let runs = expected.missing.runs_within(PageRun::new(run.first, run.count));
                runs.map(|run| BlockRun::new(run.first.0, run.count)).collect()
            }
        }
    }

    /// The missing blocks of `run`, claimed together; nothing while somebody else has one of them.
    fn claim(&mut self, run: BlockRun) -> Option<Vec<BlockRun>> {
        if self.claimed.iter().any(|claimed| claimed.overlaps(run)) {
            return None;
        }
        let missing = self.missing(run);
        self.claimed.extend(&missing);
        Some(missing)
    }
}

/// Missing blocks that only the holder writes. They are there when it is [settled](Claim::settle), and missing still when it is dropped.
pub(super) struct Claim<'a> {
    arriving: &'a Arriving,
    runs: Vec<BlockRun>,
}

impl Claim<'_> {
    /// All of them have been written.
    pub(super) fn settle(self) {
        if let Some(Expected { missing, .. }) = &mut self.arriving.state().expected {
            self.runs.iter().for_each(|run| {
                missing.remove(PageRun::new(run.first, run.count));
            });
            self.arriving.note_complete(missing);
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.arriving.state().claimed.retain(|run| !self.runs.contains(run));
        self.arriving.news.notify_all();
    }
}

impl Arriving {
    /// Of a disk of `disk_size` bytes none of which has come.
    pub(super) fn new(disk_size: u64, image: &Arc<LockedImage>) -> Arc<Self> {
        let (complete, state, news) = Default::default();
        Arc::new(Arriving { disk_size, image: Arc::downgrade(image), complete, state, news })
    }

    /// From now on `missing` are missing and all other blocks are there; `on_missing` is told, with nothing locked, what a request of the guest
    /// begins to wait for. To be called once, before the guest runs, also if nothing is missing.
    pub fn expect(&self, missing: impl IntoIterator<Item = BlockRun>, on_missing: impl Fn(BlockRun) + Send + Sync + 'static) {
        let mut set = PageSet::empty(BlockRun::all(self.disk_size).count);
        missing.into_iter().for_each(|run| {
            set.insert(PageRun::new(run.first, run.count));
        });
        let mut state = self.state();
        // What came before the switch is not to make a block present that is missing since.
        while !state.claimed.is_empty() {
            state = self.news.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.note_complete(&mut set);
        state.expected = Some(Expected { missing: set, on_missing: Arc::new(on_missing) });
        self.news.notify_all();
    }

    /// The blocks of `run` have come: [`COPY_BLOCK`] bytes for each, of which those beyond the disk's end are left out. Before
    /// [`Arriving::expect`] they are written whatever was there, afterwards those that are missing, and then nobody waits for any of them. An
    /// error leaves them missing.
    pub fn place(&self, run: BlockRun, contents: &[u8]) -> io::Result<()> {
        if run.count.checked_mul(COPY_BLOCK) != Some(contents.len() as u64) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the content of the blocks is not as long as the blocks"));
        }
        let before_switch = self.place_with(run, |image, bytes| {
            let from = (bytes.start - run.first * COPY_BLOCK) as usize;
            let length = (bytes.end - bytes.start) as usize;
            let content = contents.get(from..from + length).ok_or(io::ErrorKind::InvalidInput)?;
            image.write_at(content, bytes.start)
        })?;
        if before_switch && let Some(image) = self.image.upgrade() {
            // So that little is left for the flush, for which the source waits.
            image.start_write_back(run.bytes(self.disk_size));
        }
        Ok(())
    }

    /// [`Arriving::place`] for blocks that are all zeros, which take no space where that is possible.
    pub fn place_zeroes(&self, run: BlockRun) -> io::Result<()> {
        self.place_with(run, |image, bytes| image.write_zeroes(bytes.start, bytes.end - bytes.start, true)).map(drop)
    }

    /// Whether nothing had been expected yet.
    fn place_with(&self, run: BlockRun, write: impl Fn(&LockedImage, Range<u64>) -> io::Result<()>) -> io::Result<bool> {
        if run.end() > BlockRun::all(self.disk_size).count {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the blocks reach beyond the end of the disk"));
        }
        let image = self.image.upgrade().ok_or_else(|| io::Error::from_raw_os_error(libc::ESHUTDOWN))?;
        // Waits also for what the guest is writing: if that fails, this is what the blocks hold.
        let (claim, before_switch) = self.wait(&[], |state| Some((state.claim(run)?, state.expected.is_none())))?;
        let claim = Claim { arriving: self, runs: claim };
        claim.runs.iter().try_for_each(|part| write(&image, part.bytes(self.disk_size)))?;
        claim.settle();
        Ok(before_switch)
    }

    /// Waits until all blocks of a range of the disk are there, to read it. In bytes.
    pub(super) fn before_read(&self, range: Range<u64>) -> io::Result<()> {
        if self.is_complete() {
            return Ok(());
        }
        let touched = BlockRun::touched_by(&range);
        self.wait(&[touched], |state| state.missing(touched).is_empty().then_some(()))
    }

    /// Waits until the blocks that a write of this range would change in part are there, and claims those missing that it covers. In bytes.
    pub(super) fn before_write(&self, range: Range<u64>) -> io::Result<Option<Claim<'_>>> {
        if self.is_complete() {
            return Ok(None);
        }
        let touched = BlockRun::touched_by(&range);
        let covered = BlockRun::covered_by(&range, self.disk_size);
        let partly = match covered.count {
            0 => [touched, covered],
            _ => [BlockRun::between(touched.first, covered.first), BlockRun::between(covered.end(), touched.end())],
        };
        let runs = self.wait(&partly, |state| {
            let ready = partly.iter().all(|run| state.missing(*run).is_empty());
            // Last, and all at once: who waits has no claim, or two could wait for each other.
            if ready { state.claim(covered) } else { None }
        })?;
        Ok(Some(Claim { arriving: self, runs }))
    }

    /// How many blocks are missing: all before [`Arriving::expect`].
    #[cfg(test)]
    pub fn missing_blocks(&self) -> u64 {
        self.state().expected.as_ref().map_or(BlockRun::all(self.disk_size).count, |expected| expected.missing.len())
    }

    /// Whether nothing is missing any more.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Nothing more will come: whoever waits for blocks, now or later, gets an error that says `reason`.
    pub fn abandon(&self, reason: &str) {
        self.state().abandoned.get_or_insert_with(|| reason.to_owned());
        self.news.notify_all();
    }

    fn note_complete(&self, missing: &mut PageSet) {
        if missing.is_empty() {
            // Its memory is not needed any more.
            *missing = PageSet::empty(0);
            self.complete.store(true, Ordering::Release);
        }
    }

    /// Waits until `ready` has a result, and asks once for what is missing of `wanted`.
    fn wait<T>(&self, wanted: &[BlockRun], mut ready: impl FnMut(&mut State) -> Option<T>) -> io::Result<T> {
        let mut state = self.state();
        let mut asked = false;
        loop {
            if let Some(result) = ready(&mut state) {
                return Ok(result);
            }
            if let Some(reason) = &state.abandoned {
                return Err(io::Error::other(format!("blocks of the disk never arrived: {reason}")));
            }
            let ask = state.expected.as_ref().map(|expected| expected.on_missing.clone()).filter(|_| !asked);
            if let Some(ask) = ask {
                asked = true;
                let missing = in_requests(wanted.iter().flat_map(|run| state.missing(*run)));
                drop(state);
                missing.into_iter().for_each(|run| ask(run));
                state = self.state();
            } else {
                state = self.news.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Arriving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arriving").field("disk_size", &self.disk_size).field("complete", &self.complete).finish_non_exhaustive()
    }
}

/// The runs in pieces of at most [`MAX_ASKED`] blocks.
fn in_requests(runs: impl Iterator<Item = BlockRun>) -> Vec<BlockRun> {
    let pieces = |run: BlockRun| {
        let starts = (run.first..run.end()).step_by(MAX_ASKED as usize);
        starts.map(move |first| BlockRun::between(first, run.end().min(first + MAX_ASKED)))
    };
    runs.flat_map(pieces).collect()
}

#[cfg(test)]
mod tests;
