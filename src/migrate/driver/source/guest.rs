//! The guest in the source's hands: tracked while it runs, stopped, let go on, or given up.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::block_io::BlockIo;
use super::super::owner::{SourceOwner, StoppedGuest};
use super::super::page_io::PageIo;
use super::super::saved::{self, MAX_COMPANIONS};
use crate::block::block_run::BlockRun;
use crate::block::dirty_bitmap::{BitmapRun, ChangeTracking, OutgoingBitmap, RunLimits};
use crate::block::disk::{Disk, DiskIo};
use crate::memory::dirty_tracker::{DirtyTracker, Tracking};
use crate::memory::{GuestRam, HostPage, PageNumber, PageRun, PageSet};
use crate::migrate::bitmap_mapping::{BitmapMapping, BitmapName};
use crate::migrate::source::{Companions, Stopped};
use crate::migrate::wire::{BitmapFlags, BitmapInfo};
use crate::vm::{MachineState, Moved, Vm, VmError, VmEvent, hot_pages};

/// After a pass that took longer nobody waits for the guest to sleep: another pass follows, most likely.
const SHORT_PASS: Duration = Duration::from_millis(20);
/// How long the moment is a good one at which the guest has gone to sleep.
const LULL: Duration = Duration::from_micros(300);

/// Why the guest is not stopped and saved.
pub enum StopError {
    /// It had ended before, or asked to restart.
    Ended(VmEvent),
    /// It could not be.
    Failed(String),
}

impl From<String> for StopError {
    fn from(reason: String) -> Self {
        StopError::Failed(reason)
    }
}

/// What the migration holds of the guest.
pub struct SourceGuest {
    owner: Arc<dyn SourceOwner>,
    tracking: Tracking,
    ram: GuestRam,
    disks: Vec<Arc<Disk>>,
    /// Those of them that are copied.
    blocks: BlockIo,
    /// Of these, from the first harvest to the end.
    changes: Vec<ChangeTracking>,
    /// Which of their bitmaps go along.
    mapping: BitmapMapping,
    tracker: Option<DirtyTracker>,
    /// What the last harvest while the guest ran has shown.
    written: PageSet,
    /// When that was.
    harvested: Option<Instant>,
    /// When a lull was waited for.
    lull: Option<Instant>,
    /// Between stop and resume, or stop and commit.
    stopped: Option<StoppedGuest>,
    /// The owner is to be told that it was stopped.
    untold: bool,
    /// From the stop on, in the order of the package.
    bitmaps: Vec<OutgoingBitmap>,
    moved: Option<Vm<Moved>>,
}

impl SourceGuest {
    pub fn new(
        owner: Arc<dyn SourceOwner>,
        tracking: Tracking,
        ram: GuestRam,
        disks: Vec<Arc<Disk>>,
        blocks: BlockIo,
        mapping: BitmapMapping,
    ) -> Self {
        let (tracker, stopped, moved) = (None, None, None);
        let written = PageSet::empty(ram.pages());
        SourceGuest {
            owner,
            tracking,
            ram,
            disks,
            blocks,
            changes: Vec::new(),
            mapping,
            tracker,
            written,
            harvested: None,
            lull: None,
            stopped,
            untold: false,
            bitmaps: Vec::new(),
            moved,
        }
    }

    /// Begins to track dirty pages and blocks; returns those that hold anything.
    pub fn start_tracking(&mut self) -> Result<PageSet, String> {
        let mut populated = PageSet::empty(self.blocks.layout().pages());
        self.tracker = Some(self.tracking.start(&self.ram, &mut populated).map_err(|error| error.to_string())?);
        for (disk, pages) in self.blocks.disks() {
            // First, so that nothing is missed which comes into being meanwhile.
            self.changes.push(disk.track_changes());
            let insert = |blocks: BlockRun| {
                populated.insert(PageRun::new(pages.first.0 + blocks.first, blocks.count));
            };
            disk.allocated(insert).map_err(|error| format!("disk {}: cannot tell what its image holds: {error}", disk.config().id))?;
        }
        Ok(populated)
    }

    /// The pages dirtied since the last harvest, and the blocks.
    pub fn harvest(&mut self) -> Result<PageSet, String> {
        // What comes after a short pass may be the switch: if it follows at once the guest sleeps still, and has dirtied nothing more.
        if self.harvested.is_some_and(|last| last.elapsed() < SHORT_PASS) {
            self.await_lull();
        }
        let dirty = self.take_dirty()?;
        self.harvested = Some(Instant::now());
        self.written.clone_from(&dirty);
        Ok(dirty)
    }

    fn await_lull(&mut self) {
        self.owner.await_lull();
        self.lull = Some(Instant::now());
    }

    fn take_dirty(&mut self) -> Result<PageSet, String> {
        let mut dirty = PageSet::empty(self.blocks.layout().pages());
        let tracker = self.tracker.as_mut().ok_or("dirty pages are not tracked")?;
        tracker.harvest(&mut dirty).map_err(|error| error.to_string())?;
        for ((_, pages), changes) in self.blocks.disks().zip(&mut self.changes) {
            // Disks begin at whole words. What is taken now is read later, and a write that comes between is marked for the next harvest.
            let first_word = (pages.first.0 / 64) as usize;
            (first_word..)
                .zip(changes.take().words())
                .filter(|(_, bits)| *bits != 0)
                .for_each(|(word, bits)| dirty.insert_word(word, bits));
        }
        Ok(dirty)
    }

    /// Clears all dirty bits; returns the pages dirtied since the last harvest.
    pub fn watch(&mut self) -> Result<PageSet, String> {
        let dirty = self.take_dirty()?;
        let all = PageRun::new(0, self.ram.pages());
        let mut pages = PageSet::empty(all.count);
        pages.insert(all);
        self.clear(&pages, all)?;
        Ok(dirty)
    }

    /// Clears the dirty bits of `pages` within `range`: before any of them is read.
    pub fn clear(&mut self, pages: &PageSet, range: PageRun) -> Result<(), String> {
        let tracker = self.tracker.as_mut().ok_or("dirty pages are not tracked")?;
        tracker.clear(pages, range).map_err(|error| error.to_string())
    }

    /// Takes the guest over and saves it, with pages that it is to bring along. After an error it may or may not be in hand;
    /// [`SourceGuest::resume`] is right for both.
    pub fn stop(&mut self, companions: Companions) -> Result<Stopped, StopError> {
        // Most of what the disks must write back is written while the guest still runs, so that giving the locks up is short. An error
        // here is none yet: giving up will meet it again.
        for disk in self.blocks.shared_disks() {
            let _ = disk.with_io(DiskIo::flush);
        }
        if self.lull.is_none_or(|lull| lull.elapsed() > LULL) {
            self.await_lull();
        }
        let begin = Instant::now();
        let guest = self.stopped.insert(self.owner.take().map_err(|reason| format!("the guest cannot be paused: {reason}"))?);
        let stopped = Instant::now();
        self.untold = guest.was_running;
        if !Arc::ptr_eq(guest.vm.fd(), self.tracking.vm()) {
            // Another machine has tracked its writes.
            return Err(StopError::Failed("the guest has restarted in the meantime; try again".into()));
        }
        let state = guest.vm.save().map_err(|error| match error {
            VmError::Ended(event) => StopError::Ended(event),
            error => StopError::Failed(format!("the guest cannot be saved: {error}")),
        })?;
        let was_running = guest.was_running;
        for (disk, _) in self.blocks.disks() {
            // Before the last harvest: nobody writes to it any more.
            disk.freeze().map_err(|error| error.to_string())?;
        }
        let bitmaps = self.reserve_bitmaps();
        let saved = Instant::now();
        // After the state was saved, because saving can write guest RAM.
        let dirty = self.take_dirty()?;
        let harvested = Instant::now();
        let (pages, rest) = match companions {
            Companions::None => (Vec::new(), Vec::new()),
            // The switch may still become one to postcopy, where such pages cannot be placed one by one.
            _ if self.ram.host_page() != HostPage::SMALL => (Vec::new(), Vec::new()),
            Companions::Hot => (self.hot_pages(&state, &dirty), Vec::new()),
            Companions::Rest(mut rest) => {
                rest.union(&dirty);
                let rest = self.if_few(&rest);
                (rest.clone(), rest)
            }
        };
        let io = PageIo::new(self.ram.clone());
        let append = |page, bytes: &mut Vec<u8>| io.copy(PageRun::single(page), bytes).map_err(|error| error.to_string());
        let machine = saved::encode_guest(was_running, &state, &pages, append)?;
        let microseconds = |from: Instant, to: Instant| to.duration_since(from).as_micros() as u64;
        Ok(Stopped {
            machine,
            rest,
            dirty,
            bitmaps,
            stop_us: microseconds(begin, stopped),
            device_state_us: microseconds(stopped, saved) + microseconds(harvested, Instant::now()),
            last_sync_us: microseconds(saved, harvested),
        })
    }

    /// Lets the owner tell others that the guest was stopped, if that is news.
    pub fn tell_of_stop(&mut self) {
        if std::mem::take(&mut self.untold) {
            self.owner.stopped();
        }
    }

    /// What the guest's registers point to, and then what it has written lately.
    fn hot_pages(&self, state: &MachineState, dirty: &PageSet) -> Vec<PageNumber> {
        let named = hot_pages(state, self.ram.memory(), MAX_COMPANIONS);
        let mut hot: Vec<_> = named.into_iter().filter_map(|address| self.ram.page_at(address)).collect();
        let ram = PageRun::new(0, self.ram.pages());
        for page in [dirty, &self.written].into_iter().flat_map(|written| written.runs_within(ram)).flat_map(PageRun::pages) {
            if hot.len() == MAX_COMPANIONS {
                break;
            }
            if !hot.contains(&page) {
                hot.push(page);
            }
        }
        hot
    }

    /// The pages of `rest`, unless they are too many, or not all of RAM.
    fn if_few(&self, rest: &PageSet) -> Vec<PageNumber> {
        let ram = PageRun::new(0, self.ram.pages());
        let pages: Vec<_> = rest.runs_within(ram).flat_map(PageRun::pages).take(MAX_COMPANIONS).collect();
        if pages.len() as u64 == rest.len() { pages } else { Vec::new() }
    }

    fn reserve_bitmaps(&mut self) -> Vec<BitmapInfo> {
        let mut infos = Vec::new();
        for disk in &self.disks {
            let id = &disk.config().id;
            for bitmap in disk.bitmaps().outgoing(|name| self.mapping.outgoing(id, name).is_some()) {
                let Some(BitmapName { disk: alias, name, .. }) = self.mapping.outgoing(id, bitmap.name()) else { continue };
                infos.push(BitmapInfo {
                    disk: alias,
                    name,
                    // At most 2 GiB.
                    granularity: bitmap.granularity().bytes() as u32,
                    bits: disk.size().div_ceil(bitmap.granularity().bytes()),
                    flags: BitmapFlags { enabled: bitmap.enabled(), persistent: bitmap.persistent() },
                });
                self.bitmaps.push(bitmap);
            }
        }
        infos
    }

    /// Words of the bitmap `index` from `first` on. Nothing where no such bitmap was reserved.
    pub fn bitmap_run(&self, index: u32, first: u64, limits: RunLimits) -> Option<BitmapRun> {
        Some(self.bitmaps.get(index as usize)?.run(first, limits))
    }

    /// Makes the guest's vCPUs stand still for `percent` of the time, whoever has it now.
    pub fn throttle(&self, percent: u8) -> Result<(), String> {
        match &self.stopped {
            Some(guest) => guest.vm.throttle(percent).map_err(|error| format!("cannot slow the guest down: {error}")),
            None => self.owner.throttle(percent),
        }
    }

    /// The guest goes on here, if it was stopped. An error is a guest that stays paused, and why.
    pub fn resume(&mut self) -> Result<(), String> {
        // First, so that the bitmaps can be used again when the guest runs.
        self.bitmaps.clear();
        self.blocks.disks().for_each(|(disk, _)| disk.thaw());
        self.stopped.take().map_or(Ok(()), |guest| self.owner.put_back(guest))
    }

    /// Gives up the disks, those that are copied excepted, and then the guest itself, unless `hindrance` tells a reason not to at the last moment. After an error the disks
    /// are locked as before and [`SourceGuest::resume`] lets the guest go on.
    pub fn give_up(&mut self, hindrance: impl FnOnce() -> Option<String>) -> Result<(), String> {
        let mut released = Vec::new();
        let mut hindered = None;
        for disk in self.blocks.shared_disks().filter(|disk| disk.io().is_ok()) {
            released.push(disk);
            if let Err(error) = disk.release() {
                hindered = Some(error.to_string());
                break;
            }
        }
        let Some(mut reason) = hindered.or_else(hindrance) else {
            self.disks
                .iter()
                .for_each(|disk| disk.snapshots().break_all("the guest has moved to another host, which writes to the disk now"));
            self.moved = self.stopped.take().map(|guest| guest.vm.give_up());
            return Ok(());
        };
        for error in released.into_iter().filter_map(|disk| disk.acquire().err()) {
            reason += &format!("; and the disk cannot be used again: {error}");
        }
        Err(reason)
    }

    /// The images that nobody needs any more once the guest is whole elsewhere.
    pub fn stale_images(&self) -> Vec<PathBuf> {
        self.blocks.disks().map(|(disk, _)| disk.config().path.clone()).collect()
    }

    /// Ends the tracking; returns the guest if it was given up.
    pub fn end(self) -> Option<Vm<Moved>> {
        // A guest that has moved has no use for it, and switching it off takes time.
        if let (Some(tracker), None) = (self.tracker, &self.moved) {
            // A guest that stays tracked runs slower, no more.
            let _ = tracker.stop();
        }
        self.moved
    }
}
