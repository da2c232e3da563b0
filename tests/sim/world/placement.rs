//! Page faults at the destination, and pages that are placed where the guest may wait for them.

use ferry::memory::{PageNumber, PageRun};
use ferry::migrate::destination::{Input, Placement};
use ferry::migrate::incoming::FaultAnswer;
use ferry::migrate::staging::Gathered;
use ferry::migrate::wire::{Frame, Totals};

use super::{Right, World};
use crate::memory::Version;

/// Pages that a reader has read.
pub(super) struct Placing {
    /// The connection.
    pub(super) reader: usize,
    /// What the account of them is.
    pub(super) pages: Totals,
    pub(super) placement: Placement,
    /// Those to be placed.
    pub(super) runs: Vec<PageRun>,
    /// Until they are placed; then it is still to be reported.
    pub(super) contents: Option<Vec<Version>>,
}

/// A huge page that has come together.
pub(super) struct Replacing {
    run: PageRun,
    /// It is in place, and still to be reported.
    in_place: bool,
}

impl World {
    /// The fault server and the second half of placements, each one step of its own thread.
    pub(super) fn destination_serves(&mut self) -> Result<(), String> {
        if !self.destination.alive {
            return Ok(());
        }
        if self.choices.chance(50) {
            return self.serve_fault();
        }
        if !self.destination.replacing.is_empty() && self.choices.chance(50) {
            return self.replace();
        }
        if self.destination.placing.is_empty() {
            return Ok(());
        }
        let chosen = self.choices.below(self.destination.placing.len() as u64) as usize;
        // First the contents, then the account of it; other threads may run in between.
        let Some(contents) = self.destination.placing[chosen].contents.take() else {
            let Placing { pages, placement, runs, .. } = self.destination.placing.remove(chosen);
            match placement {
                Placement::Direct => self.destination.engine.received(pages),
                Placement::Fault => runs.into_iter().for_each(|run| self.destination.engine.placed(run, self.now)),
                Placement::Staged => {
                    self.destination.heard_at = self.now;
                    runs.into_iter().for_each(|run| self.destination.engine.staged(run, true, self.now));
                }
            }
            self.take_gathered();
            return Ok(());
        };
        let Placing { placement, runs, .. } = &self.destination.placing[chosen];
        let (placement, runs) = (*placement, runs.clone());
        if placement == Placement::Fault {
            runs.iter().try_for_each(|run| self.check_whole_host_pages(*run))?;
        }
        for (page, version) in runs.iter().flat_map(|run| run.pages()).zip(contents) {
            match placement {
                Placement::Fault => self.place_from_source(page, version)?,
                // It held something else before.
                Placement::Direct if version == 0 => self.destination.ram.empty(page),
                Placement::Direct => self.destination.ram.fill(page, version),
                Placement::Staged => drop(self.destination.staging.insert(page, version)),
            }
        }
        Ok(())
    }

    /// Whoever has placed something looks for huge pages.
    pub(super) fn take_gathered(&mut self) {
        while let Some(Gathered::Contents(run) | Gathered::Zero(run)) = self.destination.engine.take_gathered() {
            self.destination.replacing.push(Replacing { run, in_place: false });
        }
    }

    /// Puts a huge page in place, or reports it. No page of it is placed meanwhile, which a lock sees to.
    fn replace(&mut self) -> Result<(), String> {
        let chosen = self.choices.below(self.destination.replacing.len() as u64) as usize;
        let Replacing { run, in_place } = &mut self.destination.replacing[chosen];
        let run = *run;
        if std::mem::replace(in_place, true) {
            self.destination.replacing.remove(chosen);
            self.destination.engine.replaced(run, self.now);
            return Ok(());
        }
        assert!(self.destination.userfault, "{run} is replaced, which nobody watches any more");
        for page in run.pages() {
            let version = self.destination.staging.remove(&page).unwrap_or(0);
            if !self.destination.ram.is_populated(page) {
                self.place_from_source(page, version)?;
            }
            if self.destination.blocked == Some(page) {
                self.destination.blocked = None;
            }
        }
        Ok(())
    }

    fn serve_fault(&mut self) -> Result<(), String> {
        let destination = &mut self.destination;
        if !destination.userfault {
            return Ok(());
        }
        if let Some(urgent) = destination.next_urgent.take() {
            destination.urgent = Some(urgent);
            for run in destination.engine.renew_requests() {
                self.request(run);
            }
            return Ok(());
        }
        if let Some(blocks) = destination.wanted.pop_front() {
            // Where the link is lost its owner is told; the next urgent connection makes up for it.
            let asked = destination.engine.wait_for_blocks(blocks, self.now);
            if !destination.engine.is_paused() {
                asked.into_iter().for_each(|run| self.request(run));
            }
            return Ok(());
        }
        let Some(page) = destination.faults.pop_front() else { return Ok(()) };
        match destination.engine.fault(page, self.now) {
            FaultAnswer::Wait => {}
            // Its owner is told; the next urgent connection makes up for it.
            FaultAnswer::Request(_) if destination.engine.is_paused() => {}
            FaultAnswer::Request(run) => self.request(run),
            FaultAnswer::Zero(run) => {
                self.check_whole_host_pages(run)?;
                run.pages().for_each(|page| self.place(page, 0));
            }
        }
        Ok(())
    }

    /// The kernel places nothing less.
    fn check_whole_host_pages(&self, run: PageRun) -> Result<(), String> {
        if self.plan.layout().divides(run) { Ok(()) } else { Err(format!("{run} is to be placed, a part of a host page")) }
    }

    fn request(&mut self, run: PageRun) {
        let Some((link, index)) = self.destination.urgent else { return };
        if self.destination.interrupted.contains(&link) {
            self.destination.urgent = None;
            let input = Input::Lost(link, ferry::migrate::wire::Channel::Urgent, "interrupted".into());
            return self.destination.engine.handle(input);
        }
        self.connections[index].to_source.send(Frame::Request(run), Vec::new());
    }

    /// A page as the source has sent it: nothing but what the guest left there.
    pub(super) fn place_from_source(&mut self, page: PageNumber, version: Version) -> Result<(), String> {
        let left = self.source.left.as_ref().map(|(pages, _)| pages[page.0 as usize]);
        if left != Some(version) {
            return Err(format!("{page} is to be placed in version {version}, but the guest left {left:?}"));
        }
        self.place(page, version);
        Ok(())
    }

    /// UFFDIO_COPY and UFFDIO_ZEROPAGE: a page that is there stays; whoever waits for it wakes.
    fn place(&mut self, page: PageNumber, version: Version) {
        self.destination.heard_at = self.now;
        if self.destination.userfault && !self.destination.ram.is_populated(page) {
            self.destination.ram.place(page, version);
        }
        if self.destination.blocked == Some(page) {
            self.destination.blocked = None;
        }
    }

    /// All is here: the watch over memory ends, and whoever waits looks again.
    pub(super) fn end_watch(&mut self) -> Result<(), String> {
        assert_eq!(self.destination.right, Right::Running);
        self.destination.userfault = false;
        self.destination.blocked = None;
        self.destination.faults.clear();
        self.destination.wanted.clear();
        self.destination.whole = true;
        self.check_whole("destination, when it is complete,")
    }
}
