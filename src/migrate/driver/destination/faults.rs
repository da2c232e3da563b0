//! Page faults of the guest that has come before its pages, and its devices' waits for blocks that have not come.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Sender, bounded};

use super::super::block_io::BlockIo;
use super::super::frames;
use super::super::page_io::PageIo;
use super::super::scheduling;
use super::Shared;
use crate::memory::staging::StagingArea;
use crate::memory::uffd::{Fault, MissingPages, UffdError, Userfaultfd};
use crate::memory::{GuestRam, PageNumber, PageRun};
use crate::migrate::destination::{Input, Link};
use crate::migrate::incoming::FaultAnswer;
use crate::migrate::report::Status;
use crate::migrate::transport::{Wake, Writer};
use crate::migrate::wire::{Channel, Frame};

/// The pages that are missing, and the thread that asks for those somebody touches, and for blocks.
pub struct FaultService {
    pub pages: MissingPages,
    /// Where huge pages come together.
    staging: Mutex<Option<Arc<StagingArea>>>,
    ram: GuestRam,
    /// Tells the thread that a new urgent connection is there, or that it is to end.
    news: Wake,
    stopped: AtomicBool,
    /// The disks that are copied.
    blocks: BlockIo,
    /// Blocks that devices have begun to wait for.
    wanted: Mutex<Vec<PageRun>>,
    /// Pages that cannot come, and that the owner was told of.
    told: Mutex<BTreeSet<PageNumber>>,
}

/// The thread, before there is anything to serve: one that is started while the guest stands still takes a processor from who loads it.
/// It ends with this value.
pub struct FaultThread(Sender<()>);

impl FaultThread {
    /// Starts it.
    pub fn start(shared: &Arc<Shared>) -> Result<Self, String> {
        let (begin, begun) = bounded(1);
        let shared = shared.clone();
        let wait = move || {
            scheduling::is_prompt();
            if begun.recv().is_ok() {
                serve_faults(&shared);
            }
        };
        let thread = std::thread::Builder::new().name("migration-faults".into()).spawn(wait);
        thread.map(|_| FaultThread(begin)).map_err(|error| format!("cannot start a thread: {error}"))
    }
}

impl FaultService {
    /// Discards `missing`, and from then on asks over the urgent connection for what is touched. Comes before anything of the guest is restored.
    pub fn start(
        shared: &Shared,
        thread: FaultThread,
        uffd: Userfaultfd,
        ram: &GuestRam,
        blocks: &BlockIo,
        missing: &[PageRun],
        staging: Option<StagingArea>,
    ) -> Result<(), String> {
        let error = |error: UffdError| error.to_string();
        let pages = uffd.register(ram.clone()).map_err(error)?;
        let staging = Mutex::new(staging.filter(|_| pages.can_replace()).map(Arc::new));
        // Where nothing has come, RAM is as it was allocated, and a walk over all of it would only prolong the blackout.
        let nothing_is_there = !shared.engine().has_received();
        let mut missing = missing.iter().filter(|run| !nothing_is_there && blocks.blocks(**run).is_none());
        // After the registration, which keeps huge pages from filling what is discarded, and before anybody looks.
        missing.try_for_each(|run| pages.discard(*run)).map_err(error)?;
        let news = Wake::new().map_err(|error| format!("cannot serve page faults: {error}"))?;
        // The urgent connection is there already.
        news.wake();
        let (ram, blocks) = (ram.clone(), blocks.clone());
        let (stopped, wanted, told) = (AtomicBool::new(false), Mutex::default(), Mutex::default());
        let service = FaultService { pages, staging, ram, blocks, news, stopped, wanted, told };
        if shared.faults.set(service).is_err() {
            return Err("page faults are served already".into());
        }
        thread.0.send(()).map_err(|_| "the thread that serves page faults died".into())
    }

    /// Ends the service; faults wait from then on.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.news.wake();
    }

    /// Whether huge pages can be put in place whole.
    pub fn can_stage(&self) -> bool {
        self.area().is_some()
    }

    /// Where huge pages come together.
    pub fn staging(&self) -> Result<PageIo, Input> {
        let area = self.area().ok_or_else(|| Input::Failed("huge pages cannot come together here".into()))?;
        Ok(PageIo::new(area.ram().clone()))
    }

    /// Puts the huge page `run`, which has come together, in place.
    pub fn replace(&self, run: PageRun) -> Result<(), UffdError> {
        self.area().map_or(Err(UffdError::BadRun(run)), |area| self.pages.replace(run, &area))
    }

    fn area(&self) -> Option<Arc<StagingArea>> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Nothing comes any more, and nobody looks for what is missing.
    pub fn end(&self) {
        self.stop();
        *self.staging.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// There is a new urgent connection.
    pub fn renew(&self) {
        self.news.wake();
    }

    /// Somebody waits for `page`, which nobody sends as things are. A guest that will never run here is not harmed by zeros, which let its
    /// restore end; any other waits, and its owner is told.
    pub fn unanswered(&self, shared: &Shared, page: PageNumber) {
        let run = PageRun::single(page);
        if let Some((disk, blocks)) = self.blocks.blocks(run) {
            // A request is for many: the first says enough of its disk.
            if self.told().insert(PageNumber(page.0 - blocks.first)) {
                let (id, block) = (&disk.config().id, blocks.first);
                shared.owner.waits_for_lost_page(format!(
                    "the guest waits for block {block} of disk {id}, which the source had not sent before the link was lost"
                ));
            }
        } else if shared.engine().status() == Status::Failed {
            // Fails only with the address space.
            let _ = self.pages.place_zero(self.ram.host_page().around(run));
        } else if self.told().insert(page) {
            let address = self.ram.guest_address(page).map_or(0, |address| address.0);
            shared.owner.waits_for_lost_page(format!(
                "the guest waits for {page} (guest address {address:#x}), which the source had not sent before the link was lost"
            ));
        }
    }

    /// A device waits for blocks.
    pub fn want(&self, run: PageRun) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).push(run);
        self.news.wake();
    }

    fn told(&self) -> MutexGuard<'_, BTreeSet<PageNumber>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn serve_faults(shared: &Arc<Shared>) {
    let Some(service) = shared.faults.get() else { return };
    let mut urgent = None;
    loop {
        let Fault { page, thread } = match service.pages.next_fault(&service.news) {
            Ok(Some(fault)) => fault,
            Ok(None) => {
                service.news.take();
                if service.stopped.load(Ordering::SeqCst) {
                    return;
                }
                let wanted = std::mem::take(&mut *service.wanted.lock().unwrap_or_else(PoisonError::into_inner));
                for blocks in wanted {
                    // Together, for the same reason as below.
                    let (asked, is_lost) = {
                        let mut engine = shared.engine();
                        (engine.wait_for_blocks(blocks, shared.now()), super::no_answers(&engine))
                    };
                    match asked.first() {
                        Some(run) if is_lost => service.unanswered(shared, run.first),
                        _ => asked.into_iter().for_each(|run| request(shared, &mut urgent, run)),
                    }
                }
                let connection = shared.links().urgent.take();
                if let Some(connection) = connection {
                    urgent = Some(connection);
                    service.told().clear();
                    let again = shared.engine().renew_requests();
                    again.into_iter().for_each(|run| request(shared, &mut urgent, run));
                }
                continue;
            }
            Err(error) => return shared.handle(Input::Failed(error.to_string())),
        };
        let (answer, is_lost) = {
            // Together, so that a loss between the two finds this page among those that are waited for.
            let mut engine = shared.engine();
            let now = shared.now();
            let answer = engine.fault(page, now);
            if let (FaultAnswer::Request(_) | FaultAnswer::Wait, Some(thread)) = (answer, thread) {
                engine.blocked(thread, page, now);
            }
            (answer, super::no_answers(&engine))
        };
        match answer {
            FaultAnswer::Zero(run) => {
                if let Err(error) = service.pages.place_zero(run) {
                    return shared.handle(Input::Failed(error.to_string()));
                }
                continue;
            }
            FaultAnswer::Request(_) | FaultAnswer::Wait if is_lost => {
                service.unanswered(shared, page);
                continue;
            }
            FaultAnswer::Request(run) => request(shared, &mut urgent, run),
            FaultAnswer::Wait => {}
        }
        // Behind the request for the page that somebody waits for, in frames of their own: the source answers in this order. Nothing is
        // waited for here, so that the next fault is asked about while these are on their way.
        let ahead = shared.engine().prefetch(page);
        ahead.into_iter().for_each(|run| request(shared, &mut urgent, run));
    }
}

/// Asks for `run`. Where no connection is, or it breaks, the next one makes up for it.
fn request(shared: &Shared, urgent: &mut Option<(Link, Writer)>, run: PageRun) {
    let Some((link, writer)) = urgent else { return };
    if let Err(error) = frames::send(writer, &Frame::Request(run), None) {
        shared.handle(Input::Lost(*link, Channel::Urgent, error.to_string()));
        *urgent = None;
    }
}
