//! The source's driver: does what the engine in [`crate::migrate::source`] says, with sockets, KVM and guest RAM.
//!
//! The migration's own thread asks the engine what to do and alone writes to the main connection; the reader of the main connection passes
//! on what the destination says; the urgent thread answers page requests by itself, on the urgent connection; and each connection for pages
//! has a thread that sends what the migration's own hands it. The engine's lock is never held while one of them sends, sleeps, waits or
//! calls KVM.

mod block_reader;
mod bulk;
mod guest;
mod links;
mod run;

use std::fs::File;
use std::io::Read;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};

use super::block_io::BlockIo;
use super::owner::{MachineSetup, PageTransfer, SourceOwner, SourceRequest};
use super::saved;
use crate::block::block_run::BlockRun;
use crate::block::disk::Disk;
use crate::memory::dirty_tracker::Tracking;
use crate::memory::{GuestRam, thp};
use crate::migrate::layout::Layout;
use crate::migrate::pace::Pace;
use crate::migrate::policy::Throttling;
use crate::migrate::report::{Mode, Progress};
use crate::migrate::source::{Config, Input, Source};
use crate::migrate::transport::{Address, Interrupt};
use crate::vm::VmEvent;

/// A migration away from here. It goes on, and its end is told to the owner, also when this handle is dropped.
pub struct SourceMigration {
    shared: Arc<Shared>,
}

/// What the handle and the migration's threads share.
struct Shared {
    engine: Mutex<Source>,
    mode: Mode,
    began: Instant,
    session: u128,
    /// Where the destination listens; a recovery may find it elsewhere.
    address: Mutex<Address>,
    /// Raised by a cancel: ends connecting, and sends of the main connection that are blocked. Never raised once the guest is given up.
    cancel: Interrupt,
    /// Tells the migration's thread that the engine or a limit has changed.
    wake: Sender<()>,
    precopy_pace: Mutex<Pace>,
    postcopy_pace: Mutex<Pace>,
    /// How pages travel.
    pages: PageTransfer,
}

impl Shared {
    fn engine(&self) -> MutexGuard<'_, Source> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn handle(&self, input: Input) {
        self.engine().handle(input, self.now());
    }

    /// The limit of what is sent in the background, before or after the commit.
    fn pace(&self, committed: bool) -> MutexGuard<'_, Pace> {
        let pace = if committed { &self.postcopy_pace } else { &self.precopy_pace };
        pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long one connection of several takes for `bytes` at the least, by the bandwidth limit that holds now.
    fn seconds_by_pace(&self, bytes: u64) -> f64 {
        let committed = self.engine().is_committed();
        let rate = self.pace(committed).rate();
        rate.map_or(0.0, |rate| (bytes * u64::from(self.pages.channels)) as f64 / rate.get() as f64)
    }

    fn wake(&self) {
        // Full means that a wake is on its way already.
        let _ = self.wake.try_send(());
    }
}

/// What the engine is told of a guest that has ended or asked to restart.
fn input_of(event: &VmEvent) -> Input {
    match event {
        VmEvent::Reset => Input::Failed("the guest restarted, which ends its migration; try again".into()),
        VmEvent::PowerOff | VmEvent::Crashed { .. } => Input::GuestEnded(event.to_string()),
    }
}

impl SourceMigration {
    /// Begins to move the guest with `ram`, whose changes `tracking` sees, and `disks`; everything slow, connecting included, happens on
    /// the migration's thread. The guest itself is asked of `owner` when it is to stand still. An error means that nothing was begun.
    pub fn start(
        request: SourceRequest,
        setup: MachineSetup,
        ram: GuestRam,
        tracking: Tracking,
        disks: Vec<Arc<Disk>>,
        owner: Arc<dyn SourceOwner>,
    ) -> Result<SourceMigration, String> {
        let failed = |error: std::io::Error| format!("cannot begin a migration: {error}");
        let mut session = [0; 16];
        File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut session)).map_err(failed)?;
        let blocks = |disk: &Arc<Disk>| BlockRun::all(if disk.config().readonly { 0 } else { disk.size() }).count;
        let copied: Vec<_> = disks.iter().map(blocks).filter(|_| request.copy_storage).collect();
        let layout = Layout::new(ram.pages(), ram.host_page(), &copied)?;
        let config = Config {
            mode: request.mode,
            downtime_limit: request.downtime_limit,
            layout: layout.clone(),
            page_channels: request.pages.channels,
            session: u128::from_le_bytes(session),
            machine: saved::encode_setup(&setup)?,
        };
        let session = config.session;
        let mut engine = if request.dry_run { Source::dry_run(config) } else { Source::new(config) };
        engine.handle(Input::SwitchoverBandwidth(request.switchover_bandwidth), Duration::ZERO);
        engine.handle(Input::PostcopyBandwidth(request.max_postcopy_bandwidth), Duration::ZERO);
        engine.handle(Input::Throttling(request.throttling), Duration::ZERO);
        engine.handle(Input::PauseBeforeSwitchover(request.pause_before_switchover), Duration::ZERO);
        let (wake, woken) = bounded(1);
        let shared = Arc::new(Shared {
            engine: Mutex::new(engine),
            mode: request.mode,
            session,
            address: Mutex::new(request.address),
            began: Instant::now(),
            cancel: Interrupt::new().map_err(failed)?,
            wake,
            precopy_pace: Mutex::new(Pace::new(request.max_bandwidth)),
            postcopy_pace: Mutex::new(Pace::new(request.max_postcopy_bandwidth)),
            pages: request.pages,
        });
        let blocks = BlockIo::new(layout, disks.clone());
        let guest = guest::SourceGuest::new(owner.clone(), tracking, ram.clone(), disks, blocks.clone(), request.bitmaps);
        let migration = run::Migration::new(shared.clone(), owner, ram.clone(), blocks, guest, woken);
        let engine = shared.clone();
        let run = move || {
            // Not in this call: it takes a walk over the page tables.
            engine.handle(Input::HugeRanges(thp::huge_ranges(&ram)));
            migration.run();
        };
        std::thread::Builder::new().name("migration".into()).spawn(run).map_err(failed)?;
        Ok(SourceMigration { shared })
    }

    /// Ends the migration before the commit because a person wants it so; the guest goes on here. After the commit it says why that cannot
    /// be.
    pub fn cancel(&self) -> Result<(), String> {
        self.end(Input::Cancel)
    }

    /// Ends the migration before the commit because of what the guest has done. After the commit it says why that cannot be.
    pub fn guest_ended(&self, event: &VmEvent) -> Result<(), String> {
        self.end(input_of(event))
    }

    fn end(&self, why: Input) -> Result<(), String> {
        let mut engine = self.shared.engine();
        if engine.is_committed() {
            return Err("the guest belongs to the destination already; the migration cannot be cancelled any more".into());
        }
        engine.handle(why, self.shared.now());
        // Under the engine's lock, so that the guest cannot be given up in between: the commit must not be interrupted.
        self.shared.cancel.raise();
        drop(engine);
        self.shared.wake();
        Ok(())
    }

    /// Switches to postcopy as soon as possible. An error where that cannot be.
    pub fn start_postcopy(&self) -> Result<(), String> {
        if self.shared.mode == Mode::Precopy {
            return Err("this migration was begun in mode precopy, so its destination is not prepared for postcopy".into());
        }
        let mut engine = self.shared.engine();
        if engine.is_over() {
            return Err("the migration is over".into());
        }
        if engine.is_committed() {
            return Err("the guest belongs to the destination already".into());
        }
        if engine.is_dry_run() {
            return Err("this is a dry run, which moves nothing".into());
        }
        engine.handle(Input::StartPostcopy, self.shared.now());
        drop(engine);
        self.shared.wake();
        Ok(())
    }

    /// Lets a migration that waits before the switch go on. An error where none waits.
    pub fn continue_switchover(&self) -> Result<(), String> {
        let mut engine = self.shared.engine();
        if !engine.waits_before_switchover() {
            return Err("the migration does not wait before the switch, in state 'pre-switchover'".into());
        }
        engine.handle(Input::Continue, self.shared.now());
        drop(engine);
        self.shared.wake();
        Ok(())
    }

    /// Changes whether the migration is to wait before the switch. One that waits already goes on waiting.
    pub fn set_pause_before_switchover(&self, pause: bool) {
        self.shared.handle(Input::PauseBeforeSwitchover(pause));
    }

    /// Changes the longest accepted blackout; the decision after the pass under way will see it.
    pub fn set_downtime_limit(&self, limit: Duration) {
        self.shared.handle(Input::DowntimeLimit(limit));
    }

    /// Changes the bandwidth to count on in the switch, in bytes a second; `None`: what was measured.
    pub fn set_switchover_bandwidth(&self, bytes_per_second: Option<NonZeroU64>) {
        self.shared.handle(Input::SwitchoverBandwidth(bytes_per_second));
    }

    /// Changes how far the guest may be slowed down in mode precopy.
    pub fn set_throttling(&self, throttling: Option<Throttling>) {
        self.shared.handle(Input::Throttling(throttling));
        self.shared.wake();
    }

    /// Changes the limit of precopy, in bytes a second.
    pub fn set_max_bandwidth(&self, bytes_per_second: Option<NonZeroU64>) {
        self.set_pace(&self.shared.precopy_pace, bytes_per_second);
    }

    /// Changes the limit of postcopy's background, in bytes a second. Pages that the guest waits for know no limit.
    pub fn set_max_postcopy_bandwidth(&self, bytes_per_second: Option<NonZeroU64>) {
        self.shared.handle(Input::PostcopyBandwidth(bytes_per_second));
        self.set_pace(&self.shared.postcopy_pace, bytes_per_second);
    }

    /// Joins a migration whose link was lost after the commit to its destination again, which listens at `address`. An error where nothing
    /// is to be joined; whether it succeeds shows in the progress.
    pub fn recover(&self, address: Address) -> Result<(), String> {
        let mut engine = self.shared.engine();
        if !engine.is_paused() {
            return Err("the migration is not paused: there is no broken link to repair".into());
        }
        *self.shared.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
        engine.handle(Input::Recover, self.shared.now());
        drop(engine);
        self.shared.wake();
        Ok(())
    }

    /// Breaks the link after the commit, on purpose.
    pub fn pause(&self) -> Result<(), String> {
        let mut engine = self.shared.engine();
        if !engine.may_be_paused() {
            return Err("only a postcopy can be paused; a migration before it can be cancelled".into());
        }
        engine.handle(Input::Pause, self.shared.now());
        drop(engine);
        self.shared.wake();
        Ok(())
    }

    /// Whether the link was lost after the commit, and nobody has asked yet for another one.
    pub fn is_paused(&self) -> bool {
        self.shared.engine().is_paused()
    }

    /// Where the migration stands.
    pub fn progress(&self) -> Progress {
        self.shared.engine().progress(self.shared.now())
    }

    /// Whether the guest is the destination's, come what may.
    pub fn is_committed(&self) -> bool {
        self.shared.engine().is_committed()
    }

    fn set_pace(&self, pace: &Mutex<Pace>, bytes_per_second: Option<NonZeroU64>) {
        pace.lock().unwrap_or_else(PoisonError::into_inner).set_rate(self.shared.now(), bytes_per_second);
        self.shared.wake();
    }
}
