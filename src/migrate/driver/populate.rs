//! Memory that the switch is going to need, made present before the guest stands still. Each page of heap or stack that is touched for the
//! first time costs a page fault, and the state of a guest takes some forty of them on each side: a fifth of the blackout. Afterwards it is
//! given back.

use std::hint::black_box;
use std::sync::{Mutex, PoisonError};

use rustix::mm::{Advice, madvise};

use crate::memory::PAGE_SIZE;

/// What saving, encoding and sending the state takes of the heap: mostly [`super::saved::MAX_COMPANIONS`] pages.
pub const TO_SAVE: usize = 384 << 10;
/// What receiving, decoding and loading it takes: these pages twice.
pub const TO_LOAD: usize = 640 << 10;
/// As deep as the calls go that do it.
const STACK: usize = 64 << 10;

/// From this length on an allocation is mapped by itself, and more free memory than this at the end of a heap is given back (mallopt(3)).
/// They stay so: the GNU C library would come to about as much by itself, but not where a program has once set one of them.
const MOST: usize = 2 * TO_LOAD;
/// What the GNU C library leaves of the free memory at the end of a heap.
const TOP_PAD: usize = 128 << 10;
/// Of a piece that is not small to the GNU C library.
const NOT_SMALL: usize = 128 << 10;

/// `heap` bytes, for the calling thread: threads have a stack and, in the GNU C library, a heap of their own.
pub fn heap_and_stack(heap: usize) {
    // What is mapped by itself is new each time, and what is given back must come anew.
    set(libc::M_MMAP_THRESHOLD, MOST);
    set(libc::M_TRIM_THRESHOLD, MOST);
    let mut block = Vec::<u8>::with_capacity(heap);
    let room = block.spare_capacity_mut();
    let whole_pages = room.as_ptr().align_offset(PAGE_SIZE)..room.len();
    if let Some(pages) = room.get_mut(whole_pages) {
        // All at once, which takes half as long as touching each. A kernel before 5.14 does without.
        // SAFETY: the memory is ours, and holds nothing.
        let _ = unsafe { madvise(pages.as_mut_ptr().cast(), pages.len(), Advice::LinuxPopulateWrite) };
    }
    drop(black_box(block));
    stack();
}

/// One thread at a time changes the limits and has its heap trimmed by them.
static GIVING_BACK: Mutex<()> = Mutex::new(());

/// What the switch, or work after it, took of the heaps goes back: all that is free, and the end of the calling thread's.
pub fn give_back() {
    let _alone = GIVING_BACK.lock().unwrap_or_else(PoisonError::into_inner);
    set(libc::M_TRIM_THRESHOLD, 0);
    set(libc::M_TOP_PAD, 0);
    // The end of a thread's heap is given back when something next to it is freed that is not small.
    drop(black_box(Vec::<u8>::with_capacity(NOT_SMALL)));
    // SAFETY: only memory that nobody has allocated goes.
    unsafe { libc::malloc_trim(0) };
    set(libc::M_TRIM_THRESHOLD, MOST);
    set(libc::M_TOP_PAD, TOP_PAD);
}

fn set(limit: libc::c_int, bytes: usize) {
    // SAFETY: a limit of the allocator, which is right with any.
    unsafe { libc::mallopt(limit, bytes as libc::c_int) };
}

#[inline(never)]
fn stack() {
    black_box([1u8; STACK]);
}
