//! Receiving a guest: the checks before the source is disturbed, the machine built while pages come, and the moment it runs.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::{Message, Vmm, VmmError, lock};
use crate::block::block_run::COPY_BLOCK;
use crate::block::disk::Disk;
use crate::memory::PAGE_SIZE;
use crate::migrate::bitmap_mapping::BitmapMapping;
use crate::migrate::destination::Outcome;
use crate::migrate::driver::destination::DestinationMigration;
use crate::migrate::driver::owner::{DestinationOwner, MachineSetup, Preparation, StoppedGuest};
use crate::migrate::layout::Layout;
use crate::migrate::report::{Progress, Status};
use crate::migrate::transport::{Address, Listener};
use crate::qmp::event::{Event, MigrationEvent};
use crate::qmp::response::Waiting;
use crate::vm::VmError;
use crate::vm::empty::EmptyVm;
use crate::vm::facts::HostFacts;

/// A guest that is expected or on its way.
#[derive(Default)]
pub(super) struct Incoming {
    /// Where disks are on this host, by id.
    disks: Vec<(String, PathBuf)>,
    active: AtomicBool,
    migration: Mutex<Option<DestinationMigration>>,
    host: Mutex<Option<JoinHandle<Host>>>,
}

/// What takes KVM a while and can be had before a source comes: what this host offers, and the beginning of a machine.
type Host = Result<(HostFacts, EmptyVm), VmError>;

fn look_at_host() -> Host {
    Ok((HostFacts::read()?, EmptyVm::create()?))
}

impl Incoming {
    /// A guest is expected, with these disks in other places than at the source.
    pub fn expecting(disks: Vec<(String, PathBuf)>) -> Self {
        let incoming = Incoming { disks, active: AtomicBool::new(true), ..Self::default() };
        incoming.look_ahead();
        incoming
    }

    /// Begins to look at this host before the source asks.
    fn look_ahead(&self) {
        // Where no thread is to be had, it is done when it is needed.
        *lock(&self.host) = std::thread::Builder::new().name("host".into()).spawn(look_at_host).ok();
    }

    /// What this host offers, and the beginning of a machine.
    fn host(&self) -> Host {
        let ahead = lock(&self.host).take();
        // A panic of the thread was printed when it happened.
        ahead.and_then(|thread| thread.join().ok()).unwrap_or_else(look_at_host)
    }

    /// The migration waits for its source from now on.
    pub fn began(&self, migration: DestinationMigration) {
        *lock(&self.migration) = Some(migration);
    }

    /// Whether a guest is expected, or has not wholly arrived.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// Whether every page and every bitmap is here.
    pub fn is_whole(&self) -> bool {
        lock(&self.migration).as_ref().is_some_and(|migration| migration.status() == Status::Completed)
    }

    /// Where the migration to here stands.
    pub fn progress(&self) -> Option<Progress> {
        let migration = lock(&self.migration);
        let migration = migration.as_ref()?;
        let layout = migration.layout();
        let (missing_pages, missing_blocks) = migration.missing();
        let (waiting, since) = migration.waiting();
        Some(Progress {
            status: migration.status(),
            ram_total: layout.ram().bytes(),
            ram_remaining: missing_pages * PAGE_SIZE as u64,
            disk_total: layout.blocks() * COPY_BLOCK,
            disk_remaining: missing_blocks * COPY_BLOCK,
            waiting_pages: waiting.len() as u64,
            waiting_ms: since.map_or(0, |since| since.as_millis() as u64),
            faults: migration.faults(),
            block_waits: migration.block_waits(),
            error: migration.lost(),
            ..Progress::default()
        })
    }

    /// What the guest waits for.
    pub fn waiting(&self) -> Option<Waiting> {
        let Progress { waiting_pages, waiting_ms, .. } = self.progress()?;
        (waiting_pages > 0).then_some(Waiting { waiting_pages, waiting_ms })
    }

    fn with_migration<T>(&self, what: impl FnOnce(&DestinationMigration) -> Result<T, String>) -> Result<T, String> {
        lock(&self.migration).as_ref().map_or_else(|| Err("no migration to or from here is under way".into()), what)
    }

    /// Breaks the link of a postcopy on purpose.
    pub fn pause(&self) -> Result<(), String> {
        self.with_migration(DestinationMigration::pause)
    }

    /// Listens at `uri`, too, for the source of a paused postcopy.
    pub fn recover(&self, uri: &str) -> Result<(), String> {
        let address: Address = uri.parse().map_err(|error| format!("{error}"))?;
        // Before the lock: a name may take its time to be resolved.
        let listener = Listener::bind(&address).map_err(|error| error.to_string())?;
        let address = listener.address().clone();
        self.with_migration(|migration| migration.recover(listener))?;
        eprintln!("ferry: waiting for the source at {address}\r");
        Ok(())
    }

    /// Does without a source that is lost, and without the dirty bitmaps that it still had.
    pub fn give_up_rest(&self) -> Result<(), String> {
        self.with_migration(DestinationMigration::give_up_rest)
    }

    /// Why the link is lost, while it is.
    pub fn lost(&self) -> Option<String> {
        self.progress()?.error
    }

    /// The process is about to end.
    pub fn close(&self) {
        if let Some(migration) = &*lock(&self.migration) {
            migration.close();
        }
    }

    /// Opens the guest's disks where they are on this host, and creates the images of those that `layout` says are copied.
    fn open_disks(&self, setup: &mut MachineSetup, layout: &Layout) -> Result<Vec<Arc<Disk>>, String> {
        let known = |id: &str| setup.config.disks.iter().any(|disk| disk.id == id);
        if let Some((id, _)) = self.disks.iter().find(|(id, _)| !known(id)) {
            return Err(format!("receive was given a disk {id:?}, but the guest has none of this id"));
        }
        if setup.disk_sizes.len() != setup.config.disks.len() {
            return Err("the source named other disks than it gave sizes for".into());
        }
        let mut disks = Vec::new();
        for (index, (config, size)) in setup.config.disks.iter_mut().zip(&setup.disk_sizes).enumerate() {
            let mapped = self.disks.iter().find(|(id, _)| *id == config.id);
            if let Some((_, path)) = mapped {
                config.path.clone_from(path);
            }
            if layout.pages_of(index).is_some() {
                // What files are made here is not for the other side to say.
                mapped.ok_or_else(|| {
                    let id = &config.id;
                    format!("disk {id} is to be copied, and nobody has said where to: `ferry receive` needs --disk id={id},path=PATH")
                })?;
                disks.push(Disk::create(config.clone(), *size).map_err(|error| error.to_string())?);
                continue;
            }
            let disk = Disk::open(config.clone()).map_err(|error| error.to_string())?;
            if disk.size() != *size {
                let path = config.path.display();
                return Err(format!("disk {}: {path} has {} bytes here and {size} at the source", config.id, disk.size()));
            }
            disks.push(disk);
        }
        Ok(disks)
    }
}

/// Memory that this host could give at all, in bytes: RAM and swap together.
fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    Some((field("MemTotal:")? + field("SwapTotal:")?) * 1024)
}

impl Vmm {
    /// Waits for a guest as if there had been no dry run.
    pub fn wait_again(self: &Arc<Self>) -> Result<(), VmmError> {
        let mut migration = lock(&self.incoming.migration);
        let Some(listener) = migration.take().and_then(DestinationMigration::into_listener) else {
            return Err(VmmError::NotReceived("nobody listens any more after a dry run".into()));
        };
        lock(&self.disks).clear();
        self.incoming.look_ahead();
        eprintln!("ferry: a source asked how its guest would move here; still waiting for a guest at {}\r", listener.address());
        *migration = Some(DestinationMigration::start(listener, Arc::new(self.clone())).map_err(VmmError::NotReceived)?);
        Ok(())
    }

    /// Everything that can be checked before the source is disturbed.
    fn prepare(self: &Arc<Self>, mut setup: MachineSetup, layout: &Layout) -> Result<Preparation, String> {
        let (host, empty) = self.incoming.host().map_err(|error| error.to_string())?;
        let refusals = setup.facts.refusals(&host);
        if !refusals.is_empty() {
            return Err(refusals.join("; "));
        }
        if host_memory().is_some_and(|memory| setup.config.memory > memory) {
            return Err(format!("the guest has {} MiB of RAM, more than this host", setup.config.memory >> 20));
        }
        let disks = self.incoming.open_disks(&mut setup, layout)?;
        // At once: who ends this process removes the images that were made.
        (*lock(&self.disks)).clone_from(&disks);
        let ram = setup.config.allocate_ram().map_err(|error| error.to_string())?;
        if setup.config.lock_memory {
            ram.may_lock().map_err(|error| error.to_string())?;
        }
        let (vmm, machine_ram, its_disks) = (self.clone(), ram.clone(), disks.clone());
        let build = move || vmm.machine.build(empty, &setup.config, machine_ram, &its_disks).map_err(|error| error.to_string());
        Ok(Preparation { ram, disks, build: Box::new(build) })
    }
}

impl DestinationOwner for Arc<Vmm> {
    fn bitmap_mapping(&self) -> BitmapMapping {
        lock(&self.outgoing).parameters.block_bitmap_mapping.clone()
    }

    fn prepare(&self, setup: MachineSetup, layout: &Layout) -> Result<Preparation, String> {
        Vmm::prepare(self, setup, layout)
    }

    fn run(&self, stopped: StoppedGuest) -> Result<(), String> {
        let mut guest = lock(&self.guest);
        guest.put(stopped.vm);
        // Also for a guest that stays paused: from the commit on its disks are nobody else's.
        let running = self.own_disks().and_then(|()| if stopped.was_running { guest.resume() } else { Ok(false) });
        running.map(drop).inspect_err(|reason| {
            eprintln!("ferry: the guest has arrived but stays paused: {reason}; `ferry resume` tries again\r");
        })
    }

    fn resumed(&self) {
        self.events.emit(&Event::Resume);
    }

    fn changed(&self, status: Status) {
        if status == Status::PostcopyActive {
            let _ = self.messages.send(Message::Recovering);
        }
        self.events.emit(&Event::Migration(MigrationEvent { status, report: None }));
    }

    fn waits_for_lost_page(&self, text: String) {
        eprintln!("ferry: {text}\r");
    }

    fn paused(&self, reason: String) {
        let Progress { ram_remaining, disk_remaining, .. } = self.incoming.progress().unwrap_or_default();
        let pages = ram_remaining / PAGE_SIZE as u64;
        let state = if lock(&self.guest).config().is_some() {
            let blocks = match disk_remaining / COPY_BLOCK {
                0 => String::new(),
                blocks => format!(" and {blocks} blocks of its disks"),
            };
            format!("{pages} pages{blocks} are missing, and the guest runs on until it needs one of them")
        } else {
            "only the source knows whether the guest is to run here".into()
        };
        let how = "`ferry recover` at the source joins them again, at this address or at one that `ferry recover --listen` opens here";
        let _ = self.messages.send(Message::Lost(format!("{reason}; {state}; {how}")));
    }

    fn ended(&self, outcome: Outcome) {
        let message = match outcome {
            Outcome::Completed => {
                // Not before: a locked page cannot be discarded, and locking populates what has not come.
                let ram = lock(&self.guest).memory_to_lock();
                if let Some(Err(error)) = ram.map(|ram| ram.lock()) {
                    eprintln!("ferry: the guest has arrived and runs, but its memory can be swapped: {error}\r");
                }
                for disk in lock(&self.disks).clone().iter().filter(|disk| disk.refuses_persistent().is_none()) {
                    if let Err(error) = disk.list_persistent(&[]) {
                        eprintln!("ferry: {error}; after a crash its persistent dirty bitmaps would be gone instead of inconsistent\r");
                    }
                }
                self.incoming.active.store(false, Ordering::Release);
                Message::Received
            }
            Outcome::DryRun => Message::DryRun,
            Outcome::Abandoned(reason) => Message::NotReceived(reason),
        };
        if !matches!(message, Message::Received) {
            self.all_disks().iter().for_each(|disk| disk.abandon_arrival());
        }
        let _ = self.messages.send(message);
    }
}
