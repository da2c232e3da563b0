//! The destination's driver: does what the engine in [`crate::migrate::destination`] says, with sockets, KVM, guest RAM and userfaultfd.
//!
//! Each connection has a thread, which first reads what the connection is. That of the main connection then polls the engine and does what
//! it says; that of the urgent connection places the pages that were asked for. A page fault is read and asked about by a thread of its
//! own. The latter two report to the engine and wake the first. The engine's lock is never held while one of them sends, receives, waits
//! or calls KVM.

mod bitmaps;
mod faults;
mod greet;
mod guest;
mod session;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::owner::DestinationOwner;
use crate::memory::PageNumber;
use crate::migrate::destination::{Destination, Input, Outcome};
use crate::migrate::report::Status;
use crate::migrate::transport::{Interrupt, Listener, Wake, Writer};
use faults::FaultService;

/// A migration to here, or the wait for one. It goes on, and its end is told to the owner, also when this handle is dropped.
pub struct DestinationMigration {
    shared: Arc<Shared>,
}

/// What the handle and the migration's threads share.
struct Shared {
    owner: Arc<dyn DestinationOwner>,
    engine: Mutex<Destination>,
    began: Instant,
    /// Wakes the thread of the main connection: the engine has something to do.
    wake: Wake,
    /// Ends all waits on connections when the migration is over.
    closing: Interrupt,
    /// From the urgent connection's greeting until the page faults are served.
    urgent: Mutex<Option<Writer>>,
    /// In postcopy.
    faults: OnceLock<FaultService>,
    /// Whether requests for pages are answered no more.
    source_gone: AtomicBool,
    outcome: OnceLock<Outcome>,
}

impl Shared {
    fn engine(&self) -> MutexGuard<'_, Destination> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Tells the engine and wakes who does what follows.
    fn handle(&self, input: Input) {
        self.engine().handle(input);
        self.look_after_waiters();
        self.wake.wake();
    }

    /// If the engine has ended without all pages, then nobody answers any more: those who wait are helped otherwise.
    fn look_after_waiters(&self) {
        let engine = self.engine();
        if !matches!(engine.status(), Status::Failed | Status::PostcopyPaused) {
            return;
        }
        // Before the waiting are looked up: who comes later sees it.
        self.source_gone.store(true, Ordering::SeqCst);
        let waiting = engine.waiting();
        drop(engine);
        if let Some(faults) = self.faults.get() {
            waiting.into_iter().for_each(|page| faults.unanswered(self, page));
        }
    }
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
            urgent: Mutex::new(None),
            faults: OnceLock::new(),
            source_gone: AtomicBool::new(false),
            outcome: OnceLock::new(),
        });
        let theirs = shared.clone();
        std::thread::Builder::new().name("migration-listen".into()).spawn(move || greet::listen(&theirs, listener)).map_err(failed)?;
        Ok(DestinationMigration { shared })
    }

    /// Gives the wait or the migration up, for this reason, which the source is told. After the commit the guest is here, and this is an
    /// error.
    pub fn stop(&self, reason: &str) -> Result<(), String> {
        let mut engine = self.shared.engine();
        if engine.is_committed() {
            return Err("the guest is here already".into());
        }
        let alone = engine.status() == Status::None;
        engine.handle(Input::Failed(reason.into()));
        drop(engine);
        if alone {
            let _ = self.shared.outcome.set(Outcome::Abandoned(reason.into()));
            self.shared.closing.raise();
        }
        self.shared.look_after_waiters();
        self.shared.wake.wake();
        Ok(())
    }

    /// Where the migration stands.
    pub fn status(&self) -> Status {
        self.shared.engine().status()
    }

    /// How many pages have not come yet, in postcopy.
    pub fn missing_pages(&self) -> u64 {
        self.shared.engine().missing().len()
    }

    /// The pages that somebody in the guest waits for, longest waiting first.
    pub fn waiting(&self) -> Vec<PageNumber> {
        self.shared.engine().waiting()
    }

    /// The guest has ended: page faults need not be served any more. Without this, a guest that misses pages for ever is held back from
    /// reading zeros in their place for as long as the process lives.
    pub fn guest_ended(&self) {
        if let Some(faults) = self.shared.faults.get() {
            faults.stop();
        }
    }
}
