use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::*;
use crate::block::block_run::BlockRun;
use crate::block::dirty_bitmap::{BitmapInfo, Granularity, RunLimits};
use crate::memory::ram::GRANULE;
use crate::memory::uffd::Userfaultfd;
use crate::memory::{GuestRam, PageNumber, PageRun};
use crate::vm::config::{CacheMode, DiskOptions};

const SIZE: u64 = 1 << 20;

struct Place {
    image: PathBuf,
    sidecar: PathBuf,
    _directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        // A path without links, as the sidecar's will be.
        let image = directory.path().canonicalize().unwrap().join("disk.img");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        let sidecar = image.with_extension("img.bitmaps");
        Place { image, sidecar, _directory: directory }
    }

    fn open(&self) -> Arc<Disk> {
        open(&self.image, false)
    }

    /// As `ferry run` does.
    fn boot(&self) -> (Arc<Disk>, Vec<String>) {
        let disk = self.open();
        let warnings = disk.acquire_for_boot().unwrap();
        (disk, warnings)
    }

    /// A run in which bitmap `b` records a write and ends cleanly; its hash.
    fn run_once(&self) -> String {
        let (disk, _) = self.boot();
        add(&disk, "b");
        write(&disk, 8192);
        let hash = disk.bitmaps().sha256("b").unwrap();
        disk.close().unwrap();
        hash
    }
}

fn open(path: &Path, readonly: bool) -> Arc<Disk> {
    Disk::open(DiskConfig { id: "root".into(), path: path.into(), readonly, options: DiskOptions::default() }).unwrap()
}

fn add(disk: &Disk, name: &str) {
    let granularity = Granularity::new(4096).unwrap();
    disk.list_persistent(&[(name, granularity)]).unwrap();
    disk.bitmaps().change(|held| held.add(name, granularity, true, true)).unwrap();
}

fn write(disk: &Disk, offset: u64) {
    disk.io().unwrap().write_zeroes(offset, 512, false).unwrap();
}

fn info(disk: &Disk, name: &str) -> BitmapInfo {
    disk.bitmaps().info().into_iter().find(|bitmap| bitmap.name == name).unwrap()
}

#[test]
fn persistent_bitmaps_come_back_and_go_on() {
    let place = Place::new();
    let hash = place.run_once();
    let (disk, warnings) = place.boot();
    assert_eq!(warnings, [""; 0]);
    assert_eq!(disk.bitmaps().sha256("b").unwrap(), hash);
    let bitmap = info(&disk, "b");
    assert!(bitmap.persistent && bitmap.recording && !bitmap.inconsistent);
    assert_eq!(disk.bitmaps().dirty_ranges("b").unwrap(), std::slice::from_ref(&(8192..12288)));
    write(&disk, 0);
    assert_eq!(info(&disk, "b").count, 8192);
    disk.bitmaps().change(|held| held.set_enabled("b", false)).unwrap();
    disk.close().unwrap();
    let (disk, _) = place.boot();
    assert_eq!((info(&disk, "b").count, info(&disk, "b").recording), (8192, false));
}

#[test]
fn an_unclean_end_leaves_them_inconsistent_until_they_are_removed() {
    let place = Place::new();
    place.run_once();
    let (disk, _) = place.boot();
    add(&disk, "new");
    write(&disk, 0);
    // As a killed process would.
    drop(disk);
    for _ in 0..2 {
        let (disk, warnings) = place.boot();
        assert!(warnings[0].contains("did not end cleanly") && warnings.len() == 1, "{warnings:?}");
        assert!(["b", "new"].iter().all(|name| info(&disk, name).inconsistent));
        // A clean end does not make them any better.
        disk.close().unwrap();
    }
    let (disk, _) = place.boot();
    for name in ["b", "new"] {
        disk.bitmaps().change(|held| held.remove(name)).unwrap();
    }
    disk.list_persistent(&[]).unwrap();
    assert!(!place.sidecar.exists());
    disk.close().unwrap();
    assert!(place.boot().1.is_empty());
}

#[test]
fn an_image_that_others_changed_makes_them_inconsistent() {
    let changes: [fn(&Path); 3] = [
        |image| File::options().write(true).open(image).unwrap().write_all_at(b"x", 5).unwrap(),
        |image| File::options().write(true).open(image).unwrap().set_len(2 * SIZE).unwrap(),
        |image| {
            fs::remove_file(image).unwrap();
            File::create(image).unwrap().set_len(SIZE).unwrap();
        },
    ];
    for change in changes {
        let place = Place::new();
        place.run_once();
        change(&place.image);
        let (disk, warnings) = place.boot();
        assert!(warnings[0].contains("was changed after"), "{warnings:?}");
        assert!(info(&disk, "b").inconsistent);
        disk.close().unwrap();
        assert!(info(&place.boot().0, "b").inconsistent);
    }
}

#[test]
fn reading_the_image_in_between_does_not_matter() {
    let place = Place::new();
    place.run_once();
    fs::read(&place.image).unwrap();
    let reader = open(&place.image, true);
    assert_eq!(reader.acquire_for_boot().unwrap(), [""; 0]);
    assert!(reader.bitmaps().info().is_empty() && reader.refuses_persistent().unwrap().contains("read-only"));
    assert!(reader.list_persistent(&[]).is_err());
    reader.close().unwrap();
    assert!(!info(&place.boot().0, "b").inconsistent);
}

#[test]
fn the_sidecar_is_useless_before_the_guest_can_write() {
    let place = Place::new();
    place.run_once();
    let (disk, _) = place.boot();
    let bytes = fs::read(&place.sidecar).unwrap();
    assert!(!crate::block::sidecar::Contents::decode(&bytes).unwrap().has_bits());
    drop(disk);
}

#[test]
fn a_damaged_sidecar_is_put_aside_and_the_guest_starts() {
    let place = Place::new();
    place.run_once();
    let whole = fs::read(&place.sidecar).unwrap();
    let damages = [Vec::new(), whole[..whole.len() - 1].to_vec(), b"something else".to_vec()];
    for damage in damages {
        fs::write(&place.sidecar, damage).unwrap();
        let (disk, warnings) = place.boot();
        assert!(warnings[0].contains("are lost: it is damaged") && warnings[0].contains("disk.img.bitmaps.unusable"), "{warnings:?}");
        assert!(disk.bitmaps().info().is_empty() && !place.sidecar.exists());
        disk.close().unwrap();
    }
    // Not even a file.
    fs::create_dir(&place.sidecar).unwrap();
    fs::remove_file(place.image.with_extension("img.bitmaps.unusable")).unwrap();
    let (_disk, warnings) = place.boot();
    assert!(warnings[0].contains("are lost: cannot read"), "{warnings:?}");
}

#[test]
fn after_a_handover_the_destination_stores_them() {
    let place = Place::new();
    place.run_once();
    let (source, _) = place.boot();
    let destination = place.open();
    let granularity = Granularity::new(4096).unwrap();
    let mut incoming = destination.bitmaps().incoming("b", granularity, true, true).unwrap();
    for outgoing in source.bitmaps().outgoing(|_| true) {
        incoming.load(0, &outgoing.run(0, RunLimits { zeroes: 0, ones: 0, words: u64::MAX })).unwrap();
    }
    source.release().unwrap();
    destination.acquire().unwrap();
    write(&destination, 0);
    // A crash of either now.
    let bytes = fs::read(&place.sidecar).unwrap();
    assert!(!crate::block::sidecar::Contents::decode(&bytes).unwrap().has_bits());
    incoming.complete().unwrap();
    source.close().unwrap();
    destination.close().unwrap();
    let (disk, warnings) = place.boot();
    assert_eq!((info(&disk, "b").count, warnings.len()), (8192, 0));
}

#[test]
fn a_handover_that_fails_changes_nothing() {
    let place = Place::new();
    place.run_once();
    let (source, _) = place.boot();
    source.release().unwrap();
    source.acquire().unwrap();
    write(&source, 0);
    source.close().unwrap();
    assert_eq!(info(&place.boot().0, "b").count, 8192);
}

#[test]
fn a_guest_from_elsewhere_makes_what_was_stored_useless() {
    let place = Place::new();
    place.run_once();
    let destination = place.open();
    destination.acquire().unwrap();
    assert!(destination.bitmaps().info().is_empty());
    write(&destination, 0);
    drop(destination);
    assert!(info(&place.boot().0, "b").inconsistent);
    // The second time it ends cleanly, with no bitmap of its own.
    let destination = place.open();
    destination.acquire().unwrap();
    destination.close().unwrap();
    assert!(!place.sidecar.exists());
}

#[test]
fn what_has_not_all_come_is_not_stored() {
    let place = Place::new();
    let disk = place.open();
    let incoming = disk.bitmaps().incoming("b", Granularity::default(), true, true).unwrap();
    disk.acquire().unwrap();
    write(&disk, 0);
    disk.close().unwrap();
    drop(incoming);
    assert!(place.boot().0.bitmaps().info().is_empty());
}

#[test]
fn while_something_can_write_they_are_not_stored() {
    let place = Place::new();
    let (disk, _) = place.boot();
    add(&disk, "b");
    let io = disk.io().unwrap();
    assert!(disk.close().unwrap_err().to_string().contains("in use"));
    drop(io);
    assert!(info(&place.boot().0, "b").inconsistent);
}

#[test]
fn a_link_to_the_image_leads_to_the_same_sidecar() {
    let place = Place::new();
    place.run_once();
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("link");
    std::os::unix::fs::symlink(&place.image, &link).unwrap();
    let disk = open(&link, false);
    disk.acquire_for_boot().unwrap();
    assert!(!info(&disk, "b").inconsistent);
}

#[test]
fn where_nothing_can_be_written_a_bitmap_is_not_persistent() {
    let place = Place::new();
    let (disk, _) = place.boot();
    // A directory in the way of the temporary file.
    fs::create_dir(place.image.with_extension("img.bitmaps.new")).unwrap();
    let error = disk.list_persistent(&[("b", Granularity::default())]).unwrap_err().to_string();
    assert!(error.contains("cannot write") && error.contains("disk.img.bitmaps"), "{error}");
}

#[test]
fn a_write_that_waits_for_a_missing_page_keeps_nobody_from_the_bitmaps() {
    let place = Place::new();
    let disk = place.open();
    disk.acquire().unwrap();
    disk.bitmaps().add("b", Granularity::new(4096).unwrap(), true).unwrap();
    let ram = GuestRam::allocate(GRANULE).unwrap();
    let missing = Userfaultfd::open().unwrap().register(ram.clone()).unwrap();
    let (never, _kept) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let pages = ram.memory().get_slice(GuestAddress(0), 2 * PAGE_SIZE).unwrap();
            disk.io().unwrap().write(&[pages], 0)
        });
        for page in 0..2 {
            assert_eq!(missing.next_fault(&never).unwrap().map(|fault| fault.page), Some(PageNumber(page)));
            disk.bitmaps().change(|held| held.add(&format!("added-{page}"), Granularity::default(), true, false)).unwrap();
            missing.place(PageRun::new(page, 1), &[page as u8 + 1; PAGE_SIZE]).unwrap();
        }
        writer.join().unwrap().unwrap();
    });
    assert_eq!(fs::read(&place.image).unwrap()[..2 * PAGE_SIZE], [[1; PAGE_SIZE], [2; PAGE_SIZE]].concat());
    assert_eq!(disk.bitmaps().copy("b").unwrap().extent(0, SIZE), (8192, true));
}

#[test]
fn a_write_that_fails_does_not_make_missing_blocks_present() {
    let place = Place::new();
    let image = Arc::new(Image::open(&place.image, true, CacheMode::Writeback).unwrap().lock().unwrap());
    let arriving = Arriving::new(SIZE, &image);
    arriving.expect([BlockRun::new(0, 2)], |_| {});
    let (bitmaps, snapshots) = (DirtyBitmaps::new(SIZE), Arc::default());
    bitmaps.add("b", Granularity::new(4096).unwrap(), true).unwrap();
    let io = DiskIo { image, bitmaps: bitmaps.clone(), snapshots, arriving: Some(arriving.clone()), discard: DiscardMode::Unmap };
    // A file that is open for reading.
    assert_eq!(io.write(&[[1u8; 4096].as_mut_slice().into()], 0).unwrap_err().raw_os_error(), Some(libc::EBADF));
    assert_eq!((arriving.missing_blocks(), bitmaps.info()[0].count), (2, 4096));
}
