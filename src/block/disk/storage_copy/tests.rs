use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;
use crate::block::dirty_bitmap::Granularity;
use crate::vm::config::{DiskConfig, DiskOptions};

/// 100 blocks, and a last one of one sector.
const SIZE: u64 = 100 * COPY_BLOCK + 512;

fn scratch() -> (TempDir, PathBuf, Arc<Disk>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let disk = open(&path);
    disk.acquire_for_boot().unwrap();
    (directory, path, disk)
}

fn config(path: &std::path::Path) -> DiskConfig {
    DiskConfig { id: "root".into(), path: path.into(), readonly: false, options: DiskOptions::default() }
}

fn open(path: &std::path::Path) -> Arc<Disk> {
    Disk::open(config(path)).unwrap()
}

fn write(disk: &Disk, offset: u64, length: usize) {
    let mut bytes = vec![7; length];
    disk.with_io(|io| io.write(&[bytes.as_mut_slice().into()], offset)).unwrap();
}

fn allocated(disk: &Disk) -> Vec<BlockRun> {
    let mut runs = Vec::new();
    disk.allocated(|run| runs.push(run)).unwrap();
    runs
}

#[test]
fn only_what_holds_data_is_visited() {
    let (_directory, _, disk) = scratch();
    assert!(allocated(&disk).is_empty());
    write(&disk, 3 * COPY_BLOCK, 2 * COPY_BLOCK as usize);
    write(&disk, 50 * COPY_BLOCK + 512, 512);
    write(&disk, 100 * COPY_BLOCK, 512);
    let runs = allocated(&disk);
    let within = |block: u64| runs.iter().any(|run| (run.first..run.end()).contains(&block));
    assert!([3, 4, 50, 100].into_iter().all(within), "{runs:?}");
    assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first) && runs.last().unwrap().end() == 101, "{runs:?}");
    assert!(!within(30) && !within(80), "{runs:?}");
}

#[test]
fn what_lies_beyond_the_end_reads_as_zeros() {
    let (_directory, _, disk) = scratch();
    write(&disk, 99 * COPY_BLOCK, COPY_BLOCK as usize + 512);
    let mut target = vec![1; 2 * COPY_BLOCK as usize];
    disk.read_blocks(99, &mut target).unwrap();
    assert!(target[..COPY_BLOCK as usize + 512].iter().all(|byte| *byte == 7));
    assert!(target[COPY_BLOCK as usize + 512..].iter().all(|byte| *byte == 0));
    disk.read_blocks(u64::MAX, &mut target).unwrap();
    assert!(target.iter().all(|byte| *byte == 0));
}

#[test]
fn only_storage_copy_reads_a_frozen_disk() {
    let (_directory, path, disk) = scratch();
    let mut tracking = disk.track_changes();
    let io = disk.io().unwrap();
    assert!(matches!(disk.freeze().unwrap_err(), DiskError::InUse(_)));
    drop(io);
    write(&disk, 0, 512);
    disk.freeze().unwrap();
    disk.freeze().unwrap();
    assert_eq!(tracking.take().words().next(), Some(1));
    assert!(matches!(disk.io().unwrap_err(), DiskError::Frozen(_)));
    assert_eq!(disk.with_io(|_| Ok(())).unwrap_err().raw_os_error(), Some(libc::ESHUTDOWN));
    assert!(matches!(disk.list_persistent(&[]).unwrap_err(), DiskError::Frozen(_)));
    // It is locked, and stays so.
    disk.acquire().unwrap();
    assert!(disk.io().is_err() && open(&path).acquire().is_err());
    let mut block = vec![0; COPY_BLOCK as usize];
    disk.read_blocks(0, &mut block).unwrap();
    assert_eq!((block[511], block[512]), (7, 0));
    assert_eq!(allocated(&disk).len(), 1);
    disk.thaw();
    disk.thaw();
    write(&disk, 0, 512);
    disk.freeze().unwrap();
    disk.release().unwrap();
    assert!(matches!(disk.freeze().unwrap_err(), DiskError::NotOwned(_)));
    disk.thaw();
    assert!(disk.read_blocks(0, &mut block).is_err() && disk.allocated(drop).is_err());
    disk.acquire().unwrap();
    write(&disk, 0, 512);
}

#[test]
fn freezing_waits_for_the_request_under_way() {
    let (_directory, _, disk) = scratch();
    std::thread::scope(|scope| {
        let freezing = disk.with_io(|io| {
            let freezing = scope.spawn(|| disk.freeze());
            // Until it waits, which keeps new requests out.
            let begun = Instant::now();
            while disk.requests.try_read().is_ok() {
                assert!(begun.elapsed() < Duration::from_secs(20) && !freezing.is_finished());
                std::thread::yield_now();
            }
            io.write_zeroes(0, 512, false)?;
            Ok(freezing)
        });
        freezing.unwrap().join().unwrap().unwrap();
    });
    assert!(disk.io().is_err());
}

#[test]
fn the_bitmaps_of_a_disk_that_went_are_inconsistent_here() {
    let (_directory, path, disk) = scratch();
    disk.list_persistent(&[("b", Granularity::default())]).unwrap();
    disk.bitmaps().change(|held| held.add("b", Granularity::default(), true, true)).unwrap();
    disk.freeze().unwrap();
    disk.close().unwrap();
    disk.thaw();
    assert!(disk.io().is_err());
    let disk = open(&path);
    disk.acquire_for_boot().unwrap();
    assert!(disk.bitmaps().info()[0].inconsistent);
}

#[test]
fn a_sidecar_of_an_earlier_image_says_nothing_of_one_that_came() {
    let (_directory, path, disk) = scratch();
    disk.bitmaps().change(|held| held.add("old", Granularity::default(), true, true)).unwrap();
    disk.close().unwrap();
    fs::remove_file(&path).unwrap();
    // Three guests come: one does not stay, one is killed, one ends cleanly.
    drop(Disk::create(config(&path), SIZE).unwrap());
    assert!(!path.exists() && !path.with_extension("img.incoming").exists());
    let create = || {
        let disk = Disk::create(config(&path), SIZE).unwrap();
        disk.arriving().unwrap().expect([], |_| {});
        disk.keep().unwrap();
        disk.keep().unwrap();
        assert!(disk.bitmaps().info().is_empty());
        disk
    };
    drop(create());
    let booted = open(&path);
    assert!(booted.acquire_for_boot().unwrap()[0].contains("was changed after"));
    assert!(booted.bitmaps().info()[0].inconsistent);
    drop(booted);
    fs::remove_file(&path).unwrap();
    let disk = create();
    disk.bitmaps().change(|held| held.add("new", Granularity::default(), true, true)).unwrap();
    disk.close().unwrap();
    let booted = open(&path);
    assert!(booted.acquire_for_boot().unwrap().is_empty());
    assert_eq!(
        booted.bitmaps().info().iter().map(|bitmap| (bitmap.name.as_str(), bitmap.inconsistent)).collect::<Vec<_>>(),
        [("new", false)]
    );
}

#[test]
fn nothing_is_stored_for_an_image_that_is_not_whole() {
    let (_directory, path, disk) = scratch();
    let sidecar = path.with_extension("img.bitmaps");
    drop(disk);
    fs::remove_file(&path).unwrap();
    let disk = Disk::create(config(&path), SIZE).unwrap();
    disk.bitmaps().change(|held| held.add("b", Granularity::default(), true, true)).unwrap();
    disk.commit_arrival();
    disk.arriving().unwrap().expect([BlockRun::new(0, 1)], |_| {});
    assert!(matches!(disk.freeze().unwrap_err(), DiskError::Arriving(_)));
    disk.close().unwrap();
    assert!(path.with_extension("img.incoming").exists() && !path.exists() && !sidecar.exists());
}

#[test]
fn an_image_that_has_no_name_yet_is_not_given_up_to_others() {
    let (_directory, path, disk) = scratch();
    drop(disk);
    fs::remove_file(&path).unwrap();
    let disk = Disk::create(config(&path), SIZE).unwrap();
    disk.release().unwrap();
    assert!(Disk::create(config(&path), SIZE).unwrap_err().to_string().contains("is there already: another Ferry receives this disk"));
    disk.acquire().unwrap();
    disk.close().unwrap();
    // Now it is another's, which the end of the first does not take away.
    let other = Disk::create(config(&path), SIZE).unwrap();
    drop(disk);
    other.keep().unwrap();
    other.release().unwrap();
    assert!(open(&path).acquire().is_ok());
}
