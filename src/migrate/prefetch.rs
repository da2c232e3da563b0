//! Which pages a guest that has come before its pages will touch next, judged by the faults it takes.
//!
//! Faults are sorted into streams by where they are: a stream is a line of pages with a fixed stride, forwards or backwards, that faults
//! follow. The thread that faults is no help: it is not always the vCPU's (see [`super::blocktime`]), and one vCPU follows several lines.
//!
//! A page that was asked for in advance raises no fault when it is touched after it has come. That it was of use is known when the
//! stream goes on behind it, or when somebody waits for it before it has come.

use crate::memory::{PageNumber, PageRun, PageSet};

/// Most pages asked for in advance because of one fault, and most of them that may be on their way at any time, so that the answer to a
/// later fault waits behind 256 KiB at most.
pub const MAX_AHEAD: u64 = 64;
/// Longest run, in pages. The pages of a run are placed together when all have come: who waits for the first of them waits for 32 KiB.
const MAX_RUN: u64 = 8;
/// Pages asked for in advance when a stream has just been recognised.
const FIRST_WINDOW: u64 = 4;
/// Streams that are followed at a time, and as many that may become some: faults without order do not push out those that are known.
const MAX_STREAMS: usize = 16;
/// Longest stride, in pages.
const MAX_STRIDE: u64 = 64;
/// How many steps a stream is followed over pages that have come by themselves.
const REACH: u64 = 512;
/// Pages that may be asked for in vain before any has been of use.
const FIRST_CREDIT: u64 = 64;
/// Most pages that may be asked for in vain, however many were of use before.
const MAX_CREDIT: u64 = 512;
/// So many faults earn a page that may be asked for in vain.
const FAULTS_PER_CREDIT: u64 = 8;

/// The streams of faults, and an account of what was proposed because of them: of each page that is proposed one is taken from a credit,
/// for each that was of use two are given back.
#[derive(Clone, Debug)]
pub struct Prefetch {
    /// The one followed last comes last.
    streams: Vec<Stream>,
    /// Proposed, and not known to have been touched.
    open: PageSet,
    credit: u64,
    faults: u64,
    proposed: u64,
    used: u64,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    last: u64,
    /// In pages. Zero until there has been a second fault.
    stride: i64,
    /// How many pages ahead of the last fault are asked for; zero while the stride is a guess.
    window: u64,
}

impl Stream {
    /// The next page, if there is one among `pages`.
    fn step(self, page: u64, pages: u64) -> Option<u64> {
        page.checked_add_signed(self.stride).filter(|next| self.stride != 0 && *next < pages)
    }

    /// How many steps it is to `page`, if it lies ahead within reach and no page before it is still to be had.
    fn steps_to(self, page: u64, can_ask: impl Fn(PageNumber) -> bool) -> Option<u64> {
        let distance = i64::try_from(page).ok()?.checked_sub(i64::try_from(self.last).ok()?)?;
        let steps = u64::try_from(distance.checked_div(self.stride)?).ok()?;
        let lies_ahead = distance % self.stride == 0 && (1..=REACH).contains(&steps);
        let mut between = (1..steps).filter_map(|step| self.last.checked_add_signed(self.stride * step as i64));
        (lies_ahead && between.all(|page| !can_ask(PageNumber(page)))).then_some(steps)
    }
}

impl Prefetch {
    /// Of a RAM of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Prefetch { streams: Vec::new(), open: PageSet::empty(pages), credit: FIRST_CREDIT, faults: 0, proposed: 0, used: 0 }
    }

    /// All has come: only the account stays.
    pub fn forget_pages(&mut self) {
        self.open = PageSet::empty(0);
    }

    /// Pages proposed so far.
    pub fn proposed(&self) -> u64 {
        self.proposed
    }

    /// Those of them that are known to have been of use.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Somebody waits for `page`, which has been asked for. Returns what to ask for behind it, in the order in which it may be needed: at
    /// most `room` and [`MAX_AHEAD`] pages, all of them such that `can_ask` says that they are missing and not on their way.
    pub fn fault(&mut self, page: PageNumber, room: u64, can_ask: impl Fn(PageNumber) -> bool) -> Vec<PageRun> {
        self.faults += 1;
        if self.faults.is_multiple_of(FAULTS_PER_CREDIT) {
            self.credit = (self.credit + 1).min(MAX_CREDIT);
        }
        let stream = self.follow(page.0, &can_ask);
        self.keep(stream);
        self.propose(stream, room, can_ask)
    }

    /// The pages of `run` come without having been asked for: asking for them in advance was of no use.
    pub fn comes_anyway(&mut self, run: PageRun) {
        self.open.remove(run);
    }

    /// What was asked for will not come; what is needed of it will be asked for again.
    pub fn forget_open(&mut self) {
        self.open = PageSet::empty(self.open.universe());
    }

    /// Takes the stream that `page` belongs to out of the list, and takes it to `page`.
    fn follow(&mut self, page: u64, can_ask: &impl Fn(PageNumber) -> bool) -> Stream {
        let known = self.streams.iter().enumerate().rev().filter(|(_, stream)| stream.window > 0);
        let found = known.filter_map(|(index, stream)| Some((index, stream.steps_to(page, can_ask)?))).next();
        if let Some((index, steps)) = found {
            let mut stream = self.streams.remove(index);
            if self.passed(stream, steps) > 0 {
                stream.window = (2 * stream.window).min(MAX_AHEAD);
            }
            return Stream { last: page, ..stream };
        }
        let near = |stream: &Stream| stream.window == 0 && (1..=MAX_STRIDE).contains(&stream.last.abs_diff(page));
        if let Some(index) = self.streams.iter().rposition(near) {
            let guess = self.streams.remove(index);
            let stride = if page > guess.last { guess.last.abs_diff(page) as i64 } else { -(guess.last.abs_diff(page) as i64) };
            // Nothing to be had lies between the two, so that they are neighbours as far as faults can tell.
            let neighbour = Stream { stride: stride.signum(), ..guess };
            if neighbour.steps_to(page, can_ask).is_some() {
                return Stream { last: page, window: FIRST_WINDOW, ..neighbour };
            }
            let window = if stride == guess.stride { FIRST_WINDOW } else { 0 };
            return Stream { last: page, stride, window };
        }
        Stream { last: page, stride: 0, window: 0 }
    }

    fn keep(&mut self, stream: Stream) {
        let alike = |other: &Stream| (other.window > 0) == (stream.window > 0);
        if self.streams.iter().filter(|other| alike(other)).count() >= MAX_STREAMS
            && let Some(oldest) = self.streams.iter().position(alike)
        {
            self.streams.remove(oldest);
        }
        self.streams.push(stream);
    }

    /// The stream has gone on by `steps`; returns how many pages turn out to have been of use.
    fn passed(&mut self, stream: Stream, steps: u64) -> u64 {
        let mut used = 0;
        let mut page = stream.last;
        for _ in 0..steps {
            let Some(next) = stream.step(page, self.open.universe()) else { break };
            page = next;
            used += self.open.remove(PageRun::new(page, 1));
        }
        self.used += used;
        self.credit = (self.credit + 2 * used).min(MAX_CREDIT);
        used
    }

    fn propose(&mut self, stream: Stream, room: u64, can_ask: impl Fn(PageNumber) -> bool) -> Vec<PageRun> {
        let mut budget = room.min(self.credit).min(MAX_AHEAD);
        let mut runs: Vec<PageRun> = Vec::new();
        let (mut page, mut ahead) = (stream.last, 0);
        for _ in 0..REACH {
            if budget == 0 || ahead >= stream.window {
                break;
            }
            let Some(next) = stream.step(page, self.open.universe()) else { break };
            page = next;
            if self.open.contains(PageNumber(page)) {
                ahead += 1;
            } else if can_ask(PageNumber(page)) {
                ahead += 1;
                budget -= 1;
                self.credit -= 1;
                self.proposed += self.open.insert(PageRun::new(page, 1));
                match runs.last_mut() {
                    Some(run) if run.end() == page && run.count < MAX_RUN => run.count += 1,
                    Some(run) if run.first.0 == page + 1 && run.count < MAX_RUN => *run = PageRun::new(page, run.count + 1),
                    _ => runs.push(PageRun::new(page, 1)),
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests;
