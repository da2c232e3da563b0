//! Notes the largest single allocation of a thread: a length from outside must not decide how much is allocated.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Noting;

#[global_allocator]
static ALLOCATOR: Noting = Noting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(size: usize) {
    // Fails only while the thread ends, when nobody asks any more.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

// SAFETY: every call goes on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Noting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as promised by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: as promised by the caller.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Runs `work`; panics if it allocated more than `limit` bytes at once.
pub fn within<R>(limit: usize, work: impl FnOnce() -> R) -> R {
    LARGEST.set(0);
    let result = work();
    let largest = LARGEST.get();
    assert!(largest <= limit, "{largest} bytes were allocated at once, more than {limit}");
    result
}

/// What decoding `length` bytes may allocate at once: serde makes room for 1 MiB on the word of a length alone, and beyond that a vector's
/// growth follows elements that are there; 24 bytes for an empty string of one byte is the worst of them, doubled by the growth.
pub const fn proportionate(length: usize) -> usize {
    (1 << 20) + 64 * length
}
