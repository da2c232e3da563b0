//! Memory that the switch is going to need, made present before the guest stands still. Each page of heap or stack that is touched for the
//! first time costs a page fault, and the state of a guest takes some forty of them on each side: a fifth of the blackout. Afterwards it is
//! given back.

use std::hint::black_box;

/// What saving, encoding and sending the state takes of the heap, and receiving, decoding and loading it.
const HEAP: usize = 320 << 10;
/// As deep as the calls go that do it.
const STACK: usize = 64 << 10;

/// For the calling thread: threads have a stack and, in the GNU C library, a heap of their own.
pub fn heap_and_stack() {
    // What is as large as this is mapped by itself the first time, and unmapped when it is freed. That raises the limit for such
    // (mallopt(3), M_MMAP_THRESHOLD), and the second is part of the heap and stays so.
    drop(black_box(Vec::<u8>::with_capacity(HEAP)));
    drop(black_box(vec![1u8; HEAP]));
    stack();
}

/// The switch is over, and what it took of the heaps goes back.
pub fn give_back() {
    // SAFETY: only memory that nobody has allocated goes.
    unsafe { libc::malloc_trim(0) };
}

#[inline(never)]
fn stack() {
    black_box([1u8; STACK]);
}
