//! Pages that are missing, and who waits for them: what the threads that serve page faults report and ask.

use std::time::Duration;

use rustix::process::Pid;

use super::{Destination, State};
use crate::memory::{HostPage, PageNumber, PageRun, PageSet};
use crate::migrate::incoming::FaultAnswer;
use crate::migrate::report::{BlockWaits, Faults};
use crate::migrate::staging::Gathered;

impl Destination {
    /// Pages that have not come yet, in postcopy.
    pub fn missing(&self) -> &PageSet {
        self.incoming.missing()
    }

    /// Whether nothing is missing, or about to be put in place, in postcopy.
    pub fn is_whole(&self) -> bool {
        self.incoming.is_whole()
    }

    /// Pages that somebody in the guest waits for, longest waiting first.
    pub fn waiting(&self) -> Vec<PageNumber> {
        self.incoming.waiting()
    }

    /// Since when the one that has waited longest waits.
    pub fn waiting_since(&self) -> Option<Duration> {
        self.incoming.waiting_since()
    }

    /// What is to be asked for on the urgent connection of a new link: all that somebody waits for.
    pub fn renew_requests(&mut self) -> Vec<PageRun> {
        self.incoming.renew()
    }

    /// What is missing of `ranges`, whole huge pages of `unit` pages, may come together elsewhere: this host can put them in place from there.
    /// Before READY.
    pub fn stage(&mut self, unit: HostPage, ranges: &[PageRun]) {
        self.incoming.stage(unit, ranges);
    }

    /// What [`Placement::Staged`](super::Placement::Staged) asked for is over: the pages of `run` are where their huge page comes together, or could not be read.
    pub fn staged(&mut self, run: PageRun, is_there: bool, now: Duration) {
        if is_there {
            self.heard_at = now;
        }
        self.incoming.received_staged(run, is_there);
    }

    /// A huge page that is to be put in place, and then to be reported with [`Destination::replaced`]. To be asked after every placement.
    pub fn take_gathered(&mut self) -> Option<Gathered> {
        self.incoming.take_gathered()
    }

    /// That huge page is in place.
    pub fn replaced(&mut self, run: PageRun, now: Duration) {
        let latencies = self.incoming.replaced(run, now);
        self.blocktime.placed(run, &latencies, now);
    }

    /// Pages have been placed by userfaultfd, or blocks in an image.
    pub fn placed(&mut self, run: PageRun, now: Duration) {
        self.heard_at = now;
        let latencies = self.incoming.placed(run, now);
        if self.layout.is_ram(run.first) {
            self.blocktime.placed(run, &latencies, now);
        } else {
            latencies.iter().for_each(|latency| self.block_waits.record(*latency));
        }
    }

    /// Somebody touched a missing page.
    pub fn fault(&mut self, page: PageNumber, now: Duration) -> FaultAnswer {
        let answer = self.incoming.fault(page, now);
        match answer {
            FaultAnswer::Request(run) => self.faults.requested += run.count,
            // What was placed since the touch. The source has been told how many there were, or is about to be.
            FaultAnswer::Zero(_) if self.is_whole() => {}
            FaultAnswer::Zero(_) => self.faults.local += 1,
            FaultAnswer::Wait => {}
        }
        answer
    }

    /// A device waits for those of `run`, blocks of a disk, that are missing; what is to be asked for.
    pub fn wait_for_blocks(&mut self, run: PageRun, now: Duration) -> Vec<PageRun> {
        self.incoming.wait_for_blocks(run, now)
    }

    /// Tells, after a fault on `page` that was not answered by [`FaultAnswer::Zero`], which `thread` it is that waits.
    pub fn blocked(&mut self, thread: Pid, page: PageNumber, now: Duration) {
        self.blocktime.begin(thread, self.layout.around(PageRun::single(page)).first, now);
    }

    /// What to ask for in advance because of that fault, once its own page has been asked for. It may be left out.
    pub fn prefetch(&mut self, page: PageNumber) -> Vec<PageRun> {
        let is_over = self.lost.is_some() || self.state == State::Ended || self.is_whole();
        if is_over { Vec::new() } else { self.incoming.prefetch(page) }
    }

    /// The waits for blocks that have ended, where disks are copied.
    pub fn block_waits(&self) -> Option<BlockWaits> {
        let [p50_us, p99_us, max_us] = self.block_waits.percentiles();
        self.layout.has_disks().then_some(BlockWaits { waited: self.block_waits.count(), p50_us, p99_us, max_us })
    }

    /// The threads of the vCPUs, that of vCPU 0 first.
    pub fn set_vcpu_threads(&mut self, threads: &[Pid]) {
        self.blocktime.set_vcpus(threads);
    }

    /// The page faults so far, once pages are missing or were.
    pub fn faults(&self) -> Option<Faults> {
        let mut faults = self.faults.clone();
        let (prefetched, used) = self.incoming.prefetched();
        (faults.prefetched, faults.prefetch_used) = (prefetched, used);
        self.blocktime.write(&mut faults);
        self.postcopy.then_some(faults)
    }
}
