//! Brings the other vCPUs up.

use core::sync::atomic::Ordering::*;

use pagestorm::cmdline::MAX_CPUS;

use super::time::rdtsc;
use super::world::RECORDS;
use super::{boot, lapic};

/// Where the trampoline is copied to: RAM on every PC, and no longer used by the loader.
const TRAMPOLINE: u32 = 0x8000;

/// [`CpuRecord::phase`](pagestorm::cpu_record::CpuRecord::phase) of a vCPU that runs.
pub const ONLINE: u64 = 1;

/// Starts vCPUs one after the other until there are `wanted` or one does not answer within a second; returns
/// how many there are, with this one. Their APIC identifiers are taken to be 0, 1, 2...
pub fn start(wanted: u32, tsc_hz: u64) -> u32 {
    let code = boot::trampoline();
    // SAFETY: conventional memory that nothing uses; the trampoline is smaller than a page.
    unsafe { core::ptr::copy_nonoverlapping(code.as_ptr(), TRAMPOLINE as *mut u8, code.len()) };
    let boot_id = lapic::id();
    let mut online = 1;
    for apic_id in (0..MAX_CPUS).filter(|&id| id != boot_id) {
        if online == wanted || !start_one(apic_id, online, tsc_hz) {
            break;
        }
        online += 1;
    }
    // One that wakes up late must not take an index that is in use.
    boot::set_next_cpu(MAX_CPUS);
    online
}

fn start_one(apic_id: u32, index: u32, tsc_hz: u64) -> bool {
    let answered = || {
        RECORDS
            .get(index as usize)
            .is_some_and(|record| record.phase.load(Acquire) == ONLINE)
    };
    let wait = |cycles: u64| {
        let start = rdtsc();
        while !answered() && rdtsc() - start < cycles {
            core::hint::spin_loop();
        }
        answered()
    };
    boot::set_next_cpu(index);
    lapic::init_ipi(apic_id);
    wait(tsc_hz / 100);
    lapic::startup_ipi(apic_id, TRAMPOLINE);
    // A second startup is only for a vCPU that missed the first (Intel SDM volume 3, 9.4.4.1).
    if wait(tsc_hz / 10) {
        return true;
    }
    lapic::startup_ipi(apic_id, TRAMPOLINE);
    wait(tsc_hz)
}
