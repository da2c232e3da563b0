//! The guest that comes: its RAM, its machine, its state.

use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::super::block_io::BlockIo;
use super::super::owner::{Build, DestinationOwner, MachineSetup, Preparation, StoppedGuest};
use super::super::page_io::PageIo;
use super::super::populate;
use super::super::saved::{self, Companions};
use super::super::scheduling;
use super::Shared;
use super::bitmaps::IncomingBitmaps;
use super::faults::{FaultService, FaultThread};
use crate::block::block_run::BlockRun;
use crate::block::disk::Disk;
use crate::block::image::is_cached;
use crate::memory::staging::StagingArea;
use crate::memory::uffd::Userfaultfd;
use crate::memory::{GuestRam, HostPage, PAGE_SIZE, PageRun, thp};
use crate::migrate::destination::Input;
use crate::migrate::layout::Layout;
use crate::migrate::wire::{Package, Setup};
use crate::vm::{Built, Vm};

/// What the migration holds of the guest.
#[derive(Default)]
pub struct DestinationGuest {
    prepared: Option<Prepared>,
    machine: Machine,
    pub bitmaps: IncomingBitmaps,
    stopped: Option<StoppedGuest>,
    /// When the guest certainly still ran at the source: its state is saved only after an answer that was sent then.
    pub ran_at: Option<Instant>,
}

/// How far the machine is.
#[derive(Default)]
enum Machine {
    #[default]
    None,
    Prepared(Build),
    Building(JoinHandle<Result<Vm<Built>, String>>),
    Built(Vm<Built>),
}

struct Prepared {
    ram: GuestRam,
    disks: Vec<Arc<Disk>>,
    /// Those of them that are copied.
    blocks: BlockIo,
    /// Where it was mapped by transparent huge pages at the source.
    huge: Vec<PageRun>,
    /// Proof that postcopy can be, if it may come.
    uffd: Option<Userfaultfd>,
    /// Waits to serve page faults then.
    fault_thread: Option<FaultThread>,
    /// Where huge pages can come together then.
    staging: Option<StagingArea>,
}

impl DestinationGuest {
    /// Checks the setup and lets the owner prepare for it.
    pub fn prepare(&mut self, shared: &Shared, setup: Setup) -> Result<(), String> {
        let Setup { ram_pages, host_page, huge, postcopy, machine, .. } = setup;
        let setup = saved::decode_setup(&machine, ram_pages)?;
        let layout = shared.engine().layout().clone();
        check_copied(&setup, &layout)?;
        let uffd = if postcopy { Some(Userfaultfd::open().map_err(|error| error.to_string())?) } else { None };
        let Preparation { ram, disks, build } = shared.owner.prepare(setup, &layout)?;
        if ram.pages() != ram_pages {
            return Err(format!("{} pages of RAM were prepared for a guest of {ram_pages}", ram.pages()));
        }
        if ram.host_page() != host_page {
            return Err(format!("RAM is made of pages of {} KiB here and {} KiB at the source", kib(ram.host_page()), kib(host_page)));
        }
        // Before the first page comes.
        thp::allow_only(&ram, &huge);
        // I/O past the page cache writes to a page's physical address, wherever it has gone meanwhile. Without an area pages come one by one.
        let cached = |disk: &Arc<Disk>| is_cached(&disk.config().path, disk.config().options.cache);
        let may_stage = postcopy && !huge.is_empty() && disks.iter().all(cached);
        let staging = if may_stage { StagingArea::new(&ram).ok() } else { None };
        let blocks = BlockIo::new(layout, disks.clone());
        *shared.io() = Some((PageIo::new(ram.clone()), blocks.clone()));
        self.machine = Machine::Prepared(build);
        self.prepared = Some(Prepared { ram, disks, blocks, huge, uffd, fault_thread: None, staging });
        Ok(())
    }

    /// Starts what takes a while and is not needed for the first pages: the building of the machine, and the thread that serves page faults.
    pub fn begin_building(&mut self, shared: &Arc<Shared>) -> Result<(), String> {
        if let Machine::Prepared(build) = std::mem::take(&mut self.machine) {
            let build = move || {
                // The guest's threads descend from this one, and it from one that somebody waits for.
                scheduling::is_ordinary();
                build()
            };
            let thread = std::thread::Builder::new().name("build".into()).spawn(build);
            self.machine = Machine::Building(thread.map_err(|error| format!("cannot start a thread: {error}"))?);
        }
        if let Some(prepared) = self.prepared.as_mut().filter(|prepared| prepared.uffd.is_some()) {
            prepared.fault_thread = Some(FaultThread::start(shared)?);
        }
        Ok(())
    }

    /// Waits until the machine is built, if that was not done before.
    pub fn finish_building(&mut self) -> Result<(), String> {
        self.machine = match std::mem::take(&mut self.machine) {
            Machine::Building(thread) => Machine::Built(thread.join().map_err(|_| "the thread that built the machine died")??),
            machine => machine,
        };
        Ok(())
    }

    /// Loads the package: everything but the commit. Returns the time it took and warnings.
    pub fn load(&mut self, shared: &Arc<Shared>, package: &Package) -> Result<Input, String> {
        let begin = Instant::now();
        let prepared = self.prepared.as_mut().ok_or("there is no RAM yet")?;
        if package.postcopy {
            let service = prepared.uffd.take().zip(prepared.fault_thread.take());
            let (uffd, thread) = service.ok_or("postcopy came, but only precopy was announced")?;
            FaultService::start(shared, thread, uffd, &prepared.ram, &prepared.blocks, &package.missing, prepared.staging.take())?;
            if shared.faults.get().is_some_and(FaultService::can_stage) {
                shared.engine().stage(HostPage::HUGE, &prepared.huge);
            }
        }
        expect_blocks(shared, &prepared.blocks, &package.missing);
        let (was_running, mut state, companions) = saved::decode_guest(&package.machine)?;
        place_companions(shared, &companions)?;
        self.finish_building()?;
        let prepared = self.prepared.as_ref().ok_or("there is no RAM yet")?;
        let Machine::Built(vm) = std::mem::take(&mut self.machine) else { return Err("the machine was used already".into()) };
        shared.engine().set_vcpu_threads(&vm.vcpu_threads());
        let (bitmaps, warnings) = IncomingBitmaps::new(&package.bitmaps, &prepared.disks, &shared.owner.bitmap_mapping());
        self.bitmaps = bitmaps;
        if let Some(ran_at) = self.ran_at {
            state.bound_blackout(begin.elapsed()..=ran_at.elapsed());
        }
        // Can touch RAM and so wait for pages, which the fault service asks for.
        let vm = vm.restore(&state).map_err(|error| format!("the guest's state cannot be loaded: {error}"))?;
        self.stopped = Some(StoppedGuest { vm, was_running });
        Ok(Input::Loaded { load_us: begin.elapsed().as_micros() as u64, warnings })
    }

    /// What was copied of disks outlives a crash of this host from here on, under the names that the images are to have.
    pub fn flush_disks(&self) -> Result<(), String> {
        let Some(prepared) = &self.prepared else { return Ok(()) };
        prepared.blocks.disks().try_for_each(|(disk, _)| disk.keep()).map_err(|error| error.to_string())
    }

    /// All of the guest is here, and nothing of its RAM is watched any more: huge pages may be anywhere, and are made again in the background
    /// where they were and have been split, or have not come into being.
    pub fn restore_huge_pages(&mut self, shared: &Arc<Shared>) {
        let Some(Prepared { ram, huge, .. }) = self.prepared.take() else { return };
        thp::allow(&ram);
        let its = shared.clone();
        let rebuild = move || {
            let rebuilt = thp::rebuild(&ram, &huge, &its.stopping);
            if rebuilt > 0 {
                eprintln!("ferry: {rebuilt} huge pages of guest memory were made again\r");
            }
            // Sets of pages, three bits for each page of RAM.
            populate::give_back();
        };
        // Without it the guest is only slower.
        let thread = std::thread::Builder::new().name("huge-pages".into()).spawn(rebuild).ok();
        *shared.rebuilding.lock().unwrap_or_else(PoisonError::into_inner) = thread;
    }

    /// Hands the guest to its owner, after the commit; true if it is to run. An error is a guest that is here but does not run.
    pub fn run(&mut self, owner: &dyn DestinationOwner) -> Result<bool, String> {
        if let Some(prepared) = &self.prepared {
            prepared.blocks.disks().for_each(|(disk, _)| disk.commit_arrival());
        }
        let guest = self.stopped.take().ok_or("the guest was not loaded")?;
        let was_running = guest.was_running;
        owner.run(guest).map(|()| was_running)
    }
}

/// Puts in place what has come with the guest, before anything touches it.
fn place_companions(shared: &Shared, companions: &Companions<'_>) -> Result<(), String> {
    let (ram, _) = shared.io().clone().ok_or("there is no RAM yet")?;
    for (page, contents) in companions.pages.iter().zip(companions.contents.chunks_exact(PAGE_SIZE)) {
        let run = PageRun::single(*page);
        match shared.faults.get() {
            Some(faults) => {
                faults.pages.place(run, contents).map_err(|error| error.to_string())?;
                shared.engine().placed(run, shared.now());
            }
            None => ram.write(run, contents).map_err(|error| error.to_string())?,
        }
    }
    Ok(())
}

/// From now on `missing` is what is missing of the disks that are copied.
fn expect_blocks(shared: &Arc<Shared>, blocks: &BlockIo, missing: &[PageRun]) {
    for (disk, pages) in blocks.disks() {
        let Some(arriving) = disk.arriving() else { continue };
        let its = missing.iter().filter(|run| pages.first <= run.first && run.end() <= pages.end());
        let its = its.map(|run| BlockRun::new(run.first.0 - pages.first.0, run.count));
        // The disk does not keep the migration.
        let migration = Arc::downgrade(shared);
        arriving.expect(its, move |blocks| {
            let Some(shared) = migration.upgrade() else { return };
            if let Some(faults) = shared.faults.get() {
                faults.want(PageRun::new(pages.first.0 + blocks.first, blocks.count));
            }
        });
    }
}

/// Whether the blocks that are to come are those of the guest's disks.
fn check_copied(setup: &MachineSetup, layout: &Layout) -> Result<(), String> {
    for (index, pages) in layout.disks() {
        let (config, size) =
            setup.config.disks.get(index).zip(setup.disk_sizes.get(index)).ok_or("a disk is to come that the guest does not have")?;
        if config.readonly || BlockRun::all(*size).count != pages.count {
            return Err(format!("{} blocks of disk {} of {size} bytes are to come, which cannot be", pages.count, config.id));
        }
    }
    Ok(())
}

fn kib(host_page: HostPage) -> u64 {
    host_page.pages() * PAGE_SIZE as u64 / 1024
}
