//! What all vCPUs share.

use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering::*};

use pagestorm::cmdline::{Config, MAX_CPUS};
use pagestorm::cpu_record::CpuRecord;
use pagestorm::layout::Layout;

use super::lapic::Timer;

/// Everything that is settled before the other vCPUs begin to work.
pub struct World {
    /// The command line.
    pub config: Config,
    /// Where pages and tables are.
    pub layout: Layout,
    /// TSC frequency.
    pub tsc_hz: u64,
    /// The LAPIC timer's speed.
    pub timer: Timer,
    /// How many vCPUs work.
    pub cpus: u32,
}

impl World {
    /// Expected generation of a page.
    pub fn generation(&self, page: u64) -> &AtomicU32 {
        assert!(page < self.layout.pages);
        // SAFETY: inside the table, which the layout gives to this alone and which is always used as atomics.
        unsafe { &*(self.layout.generations as *const AtomicU32).add(page as usize) }
    }
}

/// What vCPUs work at.
pub mod stage {
    /// Waiting for the world to be settled.
    pub const BOOT: u64 = 0;
    /// Filling pages.
    pub const FILL: u64 = 1;
    /// The workload.
    pub const RUN: u64 = 2;
    /// One last check of everything.
    pub const FINAL: u64 = 3;
}

static WORLD: AtomicPtr<World> = AtomicPtr::new(core::ptr::null_mut());
static STAGE: AtomicU64 = AtomicU64::new(stage::BOOT);

/// One for each vCPU.
pub static RECORDS: [CpuRecord; MAX_CPUS as usize] =
    [const { CpuRecord::new() }; MAX_CPUS as usize];

/// Makes the world known to the other vCPUs and has them fill pages.
pub fn publish(world: &'static World) {
    for (cpu, record) in (0..world.cpus).zip(&RECORDS) {
        let (first, pages) = pagestorm::workload::share(world.layout.pages, world.cpus, cpu);
        record.first_page.store(first, Relaxed);
        record.pages.store(pages, Relaxed);
    }
    WORLD.store((&raw const *world).cast_mut(), Release);
    set_stage(stage::FILL);
}

/// The world, once it is known.
pub fn wait_for_world() -> &'static World {
    wait_for_stage(stage::FILL);
    // SAFETY: stored before the stage was set, and for good.
    unsafe { &*WORLD.load(Acquire) }
}

/// What vCPUs are to work at now.
pub fn current_stage() -> u64 {
    STAGE.load(Acquire)
}

/// For the boot vCPU.
pub fn set_stage(stage: u64) {
    STAGE.store(stage, Release);
}

/// Spins until `stage` is reached.
pub fn wait_for_stage(stage: u64) {
    while current_stage() < stage {
        core::hint::spin_loop();
    }
}
