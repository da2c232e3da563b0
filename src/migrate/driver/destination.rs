//! The destination's driver: does what the engine in [`crate::migrate::destination`] says, with sockets, KVM, guest RAM and userfaultfd.
//!
//! Each connection has a thread, which first reads what the connection is. That of the first main connection then polls the engine and does
//! what it says, to the migration's end: main connections that replace it are handed over to it. Those of all other connections put the pages
//! in place that come there. A page fault is read and asked about by a thread of its own. All of these report to the engine and wake the
//! first where that leaves something to do. The engine's lock is never held while one of them sends, receives, waits or calls KVM.

mod bitmaps;
mod faults;
mod greet;
mod guest;
mod pages;
mod session;
mod urgent_blocks;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::block_io::BlockIo;
use super::owner::DestinationOwner;
use super::page_io::PageIo;
use crate::memory::PageNumber;
use crate::migrate::destination::{Destination, Input, Link, Outcome};
use crate::migrate::layout::Layout;
use crate::migrate::report::{BlockWaits, Faults, Status};
use crate::migrate::transport::{Interrupt, Listener, Reader, Wake, Writer};
use faults::FaultService;

/// A migration to here, or the wait for one. It goes on, and its end is told to the owner, also when this handle is dropped.
pub struct DestinationMigration {
    shared: Arc<Shared>,
    /// Threads that accept connections.
    listening: Mutex<Vec<JoinHandle<Listener>>>,
}

/// What the handle and the migration's threads share.
struct Shared {
    owner: Arc<dyn DestinationOwner>,
    engine: Mutex<Destination>,
    began: Instant,
    /// Wakes the migration's thread: the engine has something to do.
    wake: Wake,
    /// Ends everything when the migration is over.
    closing: Interrupt,
    /// Taken after the engine's lock where both are.
    links: Mutex<Links>,
    /// Connections at a time, those that have not yet said what they are included.
    connections: AtomicUsize,
    /// The guest's RAM, and the disks that are copied, from when they are there to the migration's end: who waits for the next one needs the
    /// memory.
    io: Mutex<Option<(PageIo, BlockIo)>>,
    /// In postcopy.
    faults: OnceLock<FaultService>,
    /// The process is about to end.
    stopping: AtomicBool,
    /// Makes huge pages again, after the migration.
    rebuilding: Mutex<Option<JoinHandle<()>>>,
}

/// Connections on their way from those who accept them to those who use them.
#[derive(Default)]
struct Links {
    /// The link that stands, and what ends all waits on its connections.
    current: Option<(Link, Interrupt)>,
    main: Option<(Reader, Writer)>,
    urgent: Option<(Link, Writer)>,
}

impl Shared {
    fn engine(&self) -> MutexGuard<'_, Destination> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn links(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn io(&self) -> MutexGuard<'_, Option<(PageIo, BlockIo)>> {
        self.io.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the engine and wakes who does what follows.
    fn handle(&self, input: Input) {
        self.engine().handle(input);
        self.look_after_waiters();
        self.wake.wake();
    }

    /// If nobody answers requests, those who wait are helped otherwise.
    fn look_after_waiters(&self) {
        let engine = self.engine();
        if !no_answers(&engine) {
            return;
        }
        let waiting = engine.waiting();
        drop(engine);
        if let Some(faults) = self.faults.get() {
            waiting.into_iter().for_each(|page| faults.unanswered(self, page));
        }
    }

    /// Ends the waits on all connections.
    fn close(&self) {
        self.closing.raise();
        if let Some((_, interrupt)) = &self.links().current {
            interrupt.raise();
        }
    }
}

/// Whether a request for a page would not be answered now.
fn no_answers(engine: &Destination) -> bool {
    engine.is_paused() || engine.status() == Status::Failed
}

impl DestinationMigration {
    /// Waits for a source on `listener` and takes its guest over. One migration: when it is over, nobody listens any more.
    pub fn start(listener: Listener, owner: Arc<dyn DestinationOwner>) -> Result<Self, String> {
        let failed = |error: std::io::Error| format!("cannot wait for a migration: {error}");
        let shared = Arc::new(Shared {
            owner,
            engine: Mutex::new(Destination::new()),
            began: Instant::now(),
            wake: Wake::new().map_err(failed)?,
            closing: Interrupt::new().map_err(failed)?,
            links: Mutex::default(),
            connections: AtomicUsize::new(0),
            io: Mutex::default(),
            faults: OnceLock::new(),
            stopping: AtomicBool::new(false),
            rebuilding: Mutex::default(),
        });
        let migration = DestinationMigration { shared, listening: Mutex::default() };
        migration.listen(listener)?;
        Ok(migration)
    }

    fn listen(&self, listener: Listener) -> Result<(), String> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name("migration-listen".into()).spawn(move || greet::listen(&shared, listener));
        let thread = thread.map_err(|error| format!("cannot wait for a migration: {error}"))?;
        self.listening.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// Waits on `listener`, too, for the source of a migration whose link was lost.
    pub fn recover(&self, listener: Listener) -> Result<(), String> {
        if !self.shared.engine().is_paused() {
            return Err("the migration is not paused: there is no broken link to repair".into());
        }
        self.listen(listener)
    }

    /// Breaks the link after READY, on purpose.
    pub fn pause(&self) -> Result<(), String> {
        let mut engine = self.shared.engine();
        if engine.status() != Status::PostcopyActive {
            return Err("only a postcopy can be paused".into());
        }
        engine.handle(Input::Pause);
        drop(engine);
        self.shared.look_after_waiters();
        self.shared.wake.wake();
        Ok(())
    }

    /// Wants no more of the source, whose link is lost: dirty bitmaps that are not complete are dropped. An error while pages are missing.
    pub fn give_up_rest(&self) -> Result<(), String> {
        let mut engine = self.shared.engine();
        if !engine.is_paused() || !engine.is_committed() {
            return Err("the guest can do without its source only when the link to it is lost after the commit".into());
        }
        let missing = engine.missing().len();
        if missing > 0 {
            return Err(format!("{missing} pages of the guest, or blocks of its disks, are at the source and nowhere else"));
        }
        if !engine.is_whole() {
            return Err("pages that have come are being put in place; try again".into());
        }
        engine.handle(Input::GiveUpRest);
        drop(engine);
        self.shared.wake.wake();
        Ok(())
    }

    /// Gives the wait or the migration up, for this reason, which the source is told. After the commit the guest is here, and this is an
    /// error.
    pub fn stop(&self, reason: &str) -> Result<(), String> {
        let mut engine = self.shared.engine();
        if engine.is_committed() {
            return Err("the guest is here already".into());
        }
        let alone = engine.status() == Status::None;
        engine.handle(Input::GiveUp(reason.into()));
        drop(engine);
        if alone {
            self.shared.close();
            self.shared.owner.ended(Outcome::Abandoned(reason.into()));
        }
        self.shared.look_after_waiters();
        self.shared.wake.wake();
        Ok(())
    }

    /// Ends what goes on in the background. For the end of the process: sockets in the file system are removed.
    pub fn close(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared.close();
        // A thread's panic was printed when it happened.
        for thread in self.listening.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = thread.join();
        }
        if let Some(thread) = self.shared.rebuilding.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
    }

    /// Ends it after a dry run; gives what it listened on back, with whoever has connected meanwhile.
    pub fn into_listener(self) -> Option<Listener> {
        self.shared.close();
        let first = self.listening.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().next();
        // A panic of the thread was printed when it happened.
        first?.join().ok()
    }

    /// Where the migration stands.
    pub fn status(&self) -> Status {
        self.shared.engine().status()
    }

    /// What is to come, once the source has told it.
    pub fn layout(&self) -> Layout {
        self.shared.engine().layout().clone()
    }

    /// How many pages of RAM and blocks of disks have not come yet, in postcopy.
    pub fn missing(&self) -> (u64, u64) {
        let engine = self.shared.engine();
        let blocks = engine.missing().runs_within(engine.layout().storage()).map(|run| run.count).sum();
        (engine.missing().len() - blocks, blocks)
    }

    /// The page faults so far, in postcopy.
    pub fn faults(&self) -> Option<Faults> {
        self.shared.engine().faults()
    }

    /// The waits for blocks so far, where disks are copied.
    pub fn block_waits(&self) -> Option<BlockWaits> {
        self.shared.engine().block_waits()
    }

    /// The pages that somebody in the guest waits for, longest waiting first, and for how long the first has been waited for.
    pub fn waiting(&self) -> (Vec<PageNumber>, Option<Duration>) {
        let engine = self.shared.engine();
        (engine.waiting(), engine.waiting_since().map(|since| self.shared.now().saturating_sub(since)))
    }

    /// Why the link is lost, while it is.
    pub fn lost(&self) -> Option<String> {
        let engine = self.shared.engine();
        engine.lost().filter(|_| engine.is_paused()).map(str::to_owned)
    }
}
