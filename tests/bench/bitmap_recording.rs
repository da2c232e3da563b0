//! What recording in dirty bitmaps costs a write: a mark alone, and 4 KiB writes to an image in the page cache through [`DiskIo`], with and
//! without bitmaps. `cargo bench --bench bitmap_recording`.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use ferry::block::dirty_bitmap::{DirtyBitmaps, Granularity};
use ferry::block::disk::{Disk, DiskIo};
use ferry::memory::GuestRam;
use ferry::vm::config::{DiskConfig, DiskOptions};
use vm_memory::{GuestAddress, GuestMemoryBackend};

const DISK: u64 = 256 << 20;
const BLOCK: u64 = 4096;
const ROUNDS: u32 = 9;

/// Nanoseconds for each call: the median of the rounds.
fn measure(count: u64, mut each: impl FnMut(u64)) -> f64 {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            (0..count).for_each(&mut each);
            start.elapsed().as_nanos() as f64 / count as f64
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[rounds.len() / 2]
}

/// Blocks in an order that is not that of addresses.
fn offset(index: u64) -> u64 {
    index.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (DISK / BLOCK) * BLOCK
}

fn with_bitmaps(bitmaps: &DirtyBitmaps, count: usize) {
    for number in bitmaps.info().len()..count {
        bitmaps.add(&number.to_string(), Granularity::default(), true).unwrap();
    }
}

fn write(io: &DiskIo, ram: &GuestRam, offset: u64) {
    let slice = ram.memory().get_slice(GuestAddress(0), BLOCK as usize).unwrap();
    io.write(&[slice], offset).unwrap();
}

fn main() {
    let word = AtomicU64::new(0);
    let bare = measure(10_000_000, |index| {
        black_box(&word).fetch_or(1 << (index % 64), Relaxed);
    });
    println!("{:<44} {bare:>9.1} ns", "an atomic or, for comparison");
    for count in [0, 1, 15] {
        let bitmaps = DirtyBitmaps::new(DISK);
        with_bitmaps(&bitmaps, count);
        let mark = measure(2_000_000, |index| bitmaps.mark(black_box(offset(index)), BLOCK));
        println!("{:<44} {mark:>9.1} ns", format!("a mark, {count} bitmaps"));
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    File::create(&path).unwrap().set_len(DISK).unwrap();
    let disk = Disk::open(DiskConfig { id: "root".into(), path, readonly: false, options: DiskOptions::default() }).unwrap();
    disk.acquire().unwrap();
    let (io, ram) = (disk.io().unwrap(), GuestRam::allocate(2 << 20).unwrap());
    // Once over the disk before it counts.
    (0..DISK / BLOCK).for_each(|block| write(&io, &ram, block * BLOCK));
    for count in [0, 1, 15] {
        with_bitmaps(disk.bitmaps(), count);
        let written = measure(100_000, |index| write(&io, &ram, offset(index)));
        println!("{:<44} {written:>9.1} ns", format!("a 4 KiB write to the page cache, {count} bitmaps"));
    }
}
