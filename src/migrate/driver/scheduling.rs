//! Which of the migration's threads the kernel lets run first where processors are short. Since Linux 6.12 a thread can ask for a slice of
//! its own (sched(7), sched_setattr(2), `sched_runtime` of SCHED_OTHER): one that wakes up and has a shorter slice than the running one
//! takes its place at once. Nobody's share of the processor changes. An older kernel ignores the request. New threads have the slice of the
//! one that starts them: who starts a vCPU's thread, or one that works long, must be an ordinary one.

use std::time::Duration;

/// Of a thread that moves pages in the background: longer than that of any other, so that whoever wakes up need not wait for it, the
/// guest's vCPUs before all.
const BULK_SLICE: Duration = Duration::from_millis(10);
/// Of a thread that somebody waits for: the shortest.
const PROMPT_SLICE: Duration = Duration::from_micros(100);
/// Of the threads that save and load the guest: short, but as long as that takes, because in its slice a thread is not disturbed.
const SWITCH_SLICE: Duration = Duration::from_micros(500);

/// `struct sched_attr` of linux/sched/types.h, first version.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const _: () = assert!(size_of::<SchedAttr>() == 48);

/// The calling thread moves pages in the background.
pub fn is_bulk() {
    set_slice(BULK_SLICE);
}

/// Somebody waits for what the calling thread does, which never takes long.
pub fn is_prompt() {
    set_slice(PROMPT_SLICE);
}

/// The calling thread works on the switch, and on little beside it.
pub fn is_switching() {
    set_slice(SWITCH_SLICE);
}

/// The calling thread is like any other again.
pub fn is_ordinary() {
    set_slice(Duration::ZERO);
}

fn set_slice(slice: Duration) {
    let mut attributes = SchedAttr::default();
    let size = size_of::<SchedAttr>() as u32;
    // SAFETY: the kernel writes at most `size` bytes, the structure's own.
    let known = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    // A policy that somebody has chosen is left alone.
    if known != 0 || attributes.policy != libc::SCHED_OTHER as u32 {
        return;
    }
    (attributes.size, attributes.runtime) = (size, slice.as_nanos() as u64);
    // SAFETY: the kernel reads the structure, whose size it was told. A refusal changes nothing.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}
