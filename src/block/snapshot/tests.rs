use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::thread;

use proptest::prelude::*;
use tempfile::TempDir;

use super::store::CLUSTER;
use super::*;
use crate::block::disk::DiskIo;
use crate::block::export_source::ExtentKind;
use crate::vm::config::{CacheMode, DiskConfig, DiskOptions};

const SECTOR: usize = 512;
/// A last cluster that is not whole.
const SIZE: usize = 10 * CLUSTER as usize + 3 * SECTOR;

fn disk(size: u64, cache: CacheMode) -> (TempDir, Arc<Disk>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    File::create(&path).unwrap().set_len(size).unwrap();
    let options = DiskOptions { cache, ..DiskOptions::default() };
    let disk = Disk::open(DiskConfig { id: "root".into(), path, readonly: false, options }).unwrap();
    disk.acquire().unwrap();
    (directory, disk)
}

fn snapshot(disk: &Arc<Disk>, name: &str) -> Snapshot {
    PreparedSnapshot::new(disk, name).unwrap().install(&disk.bitmaps().hold())
}

/// With a file of the test's.
fn snapshot_in(disk: &Arc<Disk>, file: File) -> Snapshot {
    PreparedSnapshot::with_file(disk, "s", file).install(&disk.bitmaps().hold())
}

fn write(io: &DiskIo, bytes: &mut [u8], offset: u64) {
    io.write(&[VolatileSlice::from(bytes)], offset).unwrap();
}

fn content(source: &dyn ExportSource) -> Vec<u8> {
    let mut bytes = vec![0xee; source.size() as usize];
    source.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Walks the extents of the whole: they cover it, and what is no data is zeros.
fn check_allocation(snapshot: &Snapshot, expected: &[u8]) {
    let mut offset = 0;
    while offset < snapshot.size() {
        let extent = snapshot.allocation(offset, snapshot.size() - offset).unwrap();
        assert!(extent.length > 0 && offset + extent.length <= snapshot.size(), "{extent:?} at {offset}");
        let range = offset as usize..(offset + extent.length) as usize;
        assert!(extent.kind == ExtentKind::Data || expected[range].iter().all(|byte| *byte == 0), "{extent:?} at {offset}");
        offset += extent.length;
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u8),
    WriteZeroes(usize, usize, bool),
    Discard(usize, usize),
    Add,
    Remove(usize),
    Read(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let sectors = SIZE / SECTOR;
    let range = (0..sectors).prop_flat_map(move |first| (Just(first), 1..=(sectors - first).min(400)));
    let range = range.prop_map(|(first, count)| (first * SECTOR, count * SECTOR));
    prop_oneof![
        4 => (range.clone(), any::<u8>()).prop_map(|((at, length), byte)| Step::Write(at, length, byte)),
        1 => (range.clone(), any::<bool>()).prop_map(|((at, length), unmap)| Step::WriteZeroes(at, length, unmap)),
        1 => range.clone().prop_map(|(at, length)| Step::Discard(at, length)),
        2 => Just(Step::Add),
        1 => (0..4usize).prop_map(Step::Remove),
        2 => range.prop_map(|(at, length)| Step::Read(at, length)),
    ]
}

fn follows_the_model(steps: Vec<Step>, cache: CacheMode) {
    // Whole blocks of direct I/O.
    let size = if cache == CacheMode::None { SIZE.next_multiple_of(4096) } else { SIZE };
    let (_directory, disk) = disk(size as u64, cache);
    let io = disk.io().unwrap();
    let image = File::open(&disk.config().path).unwrap();
    // Each with a copy of all of the image at its time.
    let mut snapshots: Vec<(String, Snapshot, Vec<u8>)> = Vec::new();
    for (number, step) in steps.into_iter().enumerate() {
        match step {
            Step::Write(at, length, byte) => write(&io, &mut vec![byte; length], at as u64),
            Step::WriteZeroes(at, length, unmap) => io.write_zeroes(at as u64, length as u64, unmap).unwrap(),
            Step::Discard(at, length) => io.discard(at as u64, length as u64).unwrap(),
            Step::Add if snapshots.len() < 3 => {
                let mut copy = vec![0; size];
                image.read_exact_at(&mut copy, 0).unwrap();
                let name = format!("s{number}");
                let snapshot = snapshot(&disk, &name);
                snapshots.push((name, snapshot, copy));
            }
            Step::Remove(index) if index < snapshots.len() => {
                let (name, snapshot, copy) = snapshots.remove(index);
                assert!(disk.snapshots().remove(&name));
                assert!(Snapshot::find(&disk, &name).is_none());
                // Whoever has it goes on with it.
                write(&io, &mut [0x3c; SECTOR], 0);
                assert!(content(&snapshot) == copy, "snapshot {name}, removed");
            }
            Step::Read(at, length) => {
                for (name, snapshot, copy) in &snapshots {
                    let mut bytes = vec![0xee; length];
                    snapshot.read_at(&mut bytes, at as u64).unwrap();
                    assert!(bytes == copy[at..at + length], "snapshot {name} from {at} on");
                }
            }
            Step::Add | Step::Remove(_) => {}
        }
    }
    for (name, _, copy) in &snapshots {
        let snapshot = Snapshot::find(&disk, name).unwrap();
        assert!(content(&snapshot) == *copy, "snapshot {name}");
        check_allocation(&snapshot, copy);
    }
    assert_eq!(disk.snapshots().names(), snapshots.iter().map(|(name, ..)| name.clone()).collect::<Vec<_>>());
    for (name, ..) in &snapshots {
        assert!(disk.snapshots().remove(name));
    }
    drop(snapshots);
    assert_eq!(disk.snapshots().count.load(Ordering::Relaxed), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn snapshots_keep_what_was_there(steps in prop::collection::vec(step(), 1..60)) {
        follows_the_model(steps, CacheMode::Writeback);
    }

    #[test]
    fn snapshots_keep_what_was_there_with_direct_io(steps in prop::collection::vec(step(), 1..30)) {
        follows_the_model(steps, CacheMode::None);
    }
}

/// Blocks of a writer, one after the other and again from the first, each of which holds the number of its write in every word.
const BLOCK: usize = 4096;
const BLOCKS: usize = 96;

fn numbers(content: &[u8], writer: usize) -> Vec<u64> {
    let region = &content[writer * BLOCK * BLOCKS..(writer + 1) * BLOCK * BLOCKS];
    let number = |block: &[u8]| {
        let mut words = block.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        let first = words.next().unwrap();
        assert!(words.all(|word| word == first), "a block of writer {writer} is torn");
        first
    };
    region.chunks_exact(BLOCK).map(number).collect()
}

#[test]
fn a_snapshot_among_writers_is_of_one_moment_and_stays_it() {
    const WRITERS: usize = 3;
    let (_directory, disk) = disk((WRITERS * BLOCKS * BLOCK) as u64, CacheMode::Writeback);
    let ended = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (io, ended) = (disk.io().unwrap(), ended.clone());
            thread::spawn(move || {
                let mut number = 0u64;
                while !ended.load(Ordering::Relaxed) {
                    number += 1;
                    let block = writer * BLOCKS + (number as usize - 1) % BLOCKS;
                    write(&io, &mut number.to_le_bytes().repeat(BLOCK / 8), (block * BLOCK) as u64);
                }
                number
            })
        })
        .collect();
    for round in 0..40 {
        let name = format!("s{round}");
        let snapshot = snapshot(&disk, &name);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let snapshot = snapshot.clone();
                thread::spawn(move || (content(&snapshot), content(&snapshot)))
            })
            .collect();
        let first = content(&snapshot);
        for reader in readers {
            let (once, again) = reader.join().unwrap();
            assert!(once == first && again == first, "round {round}: two reads differ");
        }
        for writer in 0..WRITERS {
            let numbers = numbers(&first, writer);
            // At one moment the last so many writes are there, and no later one.
            let last = numbers.iter().copied().max().unwrap();
            for (block, number) in numbers.into_iter().enumerate() {
                let expected = (0..BLOCKS as u64)
                    .filter_map(|back| last.checked_sub(back))
                    .find(|number| *number > 0 && (*number as usize - 1) % BLOCKS == block);
                assert_eq!(number, expected.unwrap_or(0), "round {round}, writer {writer}, block {block}, last write {last}");
            }
        }
        assert!(disk.snapshots().remove(&name));
    }
    ended.store(true, Ordering::Relaxed);
    assert!(writers.into_iter().all(|writer| writer.join().unwrap() > 0));
    assert_eq!(disk.snapshots().count.load(Ordering::Relaxed), 0);
}

#[test]
fn a_full_temporary_file_breaks_the_snapshot_and_not_the_write() {
    let (_directory, disk) = disk(4 * CLUSTER, CacheMode::Writeback);
    let io = disk.io().unwrap();
    write(&io, &mut [1; 1024], 0);
    // Every write to it fails with ENOSPC.
    let full = snapshot_in(&disk, OpenOptions::new().read(true).write(true).open("/dev/full").unwrap());
    let other = snapshot(&disk, "other");
    // A hole is kept in no space at all.
    write(&io, &mut [2; 512], 2 * CLUSTER);
    assert_eq!(full.broken(), None);
    write(&io, &mut [3; 512], 0);
    assert!(full.broken().unwrap().contains("No space left"), "{:?}", full.broken());
    let error = full.read_at(&mut [0; 512], 3 * CLUSTER).unwrap_err();
    assert!(error.to_string().contains("snapshot 's' is broken") && error.to_string().contains("No space left"), "{error}");
    assert!(full.allocation(0, 512).is_err());
    let mut now = [0; 1024];
    io.read(&[VolatileSlice::from(&mut now[..])], 0).unwrap();
    assert_eq!((now[0], now[1023]), (3, 1));
    assert!(content(&other)[..1024] == [1; 1024]);
}

#[test]
fn a_disk_that_is_given_up_has_no_snapshots_to_read_until_it_is_taken_back() {
    let (_directory, disk) = disk(SIZE as u64, CacheMode::Writeback);
    let snapshot = snapshot(&disk, "s");
    disk.release().unwrap();
    assert_eq!(snapshot.read_at(&mut [0; 512], 0).unwrap_err().raw_os_error(), Some(libc::ESHUTDOWN));
    assert!(matches!(PreparedSnapshot::new(&disk, "t"), Err(SnapshotError::Disk(_))));
    // The switch did not take place.
    disk.acquire().unwrap();
    write(&disk.io().unwrap(), &mut [1; 512], 0);
    assert!(content(&snapshot)[..512] == [0; 512]);
    disk.release().unwrap();
    disk.snapshots().break_all("others write");
    disk.acquire().unwrap();
    assert!(snapshot.read_at(&mut [0; 512], 0).unwrap_err().to_string().contains("is broken"));
}

#[test]
fn what_was_a_hole_stays_one_and_discards_do_nothing() {
    let (_directory, disk) = disk(128 << 20, CacheMode::Writeback);
    let io = disk.io().unwrap();
    write(&io, &mut vec![1; CLUSTER as usize], CLUSTER);
    let snapshot = snapshot(&disk, "s");
    write(&io, &mut vec![2; 4 * CLUSTER as usize], 0);
    io.discard(0, 128 << 20).unwrap();
    let mut now = [0; 512];
    io.read(&[VolatileSlice::from(&mut now[..])], CLUSTER).unwrap();
    assert_eq!(now, [2; 512]);
    let extents: Vec<_> = [0, CLUSTER, 2 * CLUSTER].map(|at| snapshot.allocation(at, (128 << 20) - at).unwrap()).into();
    assert_eq!(extents[0], Extent { length: CLUSTER, kind: ExtentKind::Hole });
    assert_eq!(extents[1], Extent { length: CLUSTER, kind: ExtentKind::Data });
    assert_eq!(extents[2].kind, ExtentKind::Hole);
}

#[test]
fn names_and_ranges_are_checked() {
    let (_directory, disk) = disk(SIZE as u64, CacheMode::Writeback);
    for name in ["", "a/b", "a\0", &"n".repeat(MAX_NAME + 1)] {
        assert!(matches!(PreparedSnapshot::new(&disk, name), Err(SnapshotError::Name(_))), "{name:?}");
    }
    let snapshot = snapshot(&disk, &"n".repeat(MAX_NAME));
    for (offset, length) in [(SIZE as u64, 512), (SIZE as u64 - 511, 512), (u64::MAX, 512)] {
        assert_eq!(snapshot.read_at(&mut vec![0; length], offset).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(snapshot.allocation(offset, length as u64).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    assert_eq!(snapshot.allocation(0, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}
