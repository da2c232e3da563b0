use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use tempfile::TempDir;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;

use super::*;
use crate::block::export_source::{Extent, ExtentKind};
use crate::memory::{GuestRam, PageSet};

fn scratch(size: u64) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    fs::File::create(&path).unwrap().set_len(size).unwrap();
    (directory, path)
}

fn locked(path: &Path) -> LockedImage {
    Image::open(path, false, CacheMode::Writeback).unwrap().lock().unwrap()
}

#[test]
fn what_is_no_image_is_refused_in_words() {
    let (directory, path) = scratch(1000);
    let words = |path: &Path| Image::open(path, true, CacheMode::Writeback).unwrap_err().to_string();
    assert!(words(&path).contains("1000 bytes"));
    assert!(words(directory.path()).contains("neither a regular file nor a block device"));
    assert!(words(&directory.path().join("none")).contains("No such file"));
    fs::write(&path, "").unwrap();
    assert!(words(&path).contains("0 bytes"));
}

#[test]
fn writers_exclude_everybody_and_readers_only_writers() {
    let (_directory, path) = scratch(4096);
    let open = |readonly| Image::open(&path, readonly, CacheMode::Writeback).unwrap();
    let writer = open(false).lock().unwrap();
    let refused = open(false).lock().unwrap_err();
    assert!(refused.to_string().contains("disk.img is in use by another runner"), "{refused}");
    assert!(open(true).lock().unwrap_err().to_string().contains("which may write to it"));
    let image = writer.unlock().unwrap();
    let reader = open(true).lock().unwrap();
    let other = open(true).lock().unwrap();
    let refused = image.lock().unwrap_err();
    drop((reader, other));
    // The refused image is as good as new.
    refused.image.lock().unwrap();
}

#[test]
fn the_lock_excludes_other_processes() {
    const CHILD: &str = "FERRY_TEST_LOCK_IMAGE";
    if let Some(path) = std::env::var_os(CHILD) {
        // In the child: lock, say so, hold the lock until the parent closes our input.
        let _locked = locked(Path::new(&path));
        println!("locked by child");
        std::io::stdout().flush().unwrap();
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        return;
    }
    let (_directory, path) = scratch(4096);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "block::image::tests::the_lock_excludes_other_processes", "--nocapture"])
        .env(CHILD, &path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains("locked by child") {
        let mut byte = [0];
        assert_eq!(output.read(&mut byte).unwrap(), 1, "the child ended: {}", String::from_utf8_lossy(&said));
        said.extend(byte);
    }
    let refused = Image::open(&path, true, CacheMode::Writeback).unwrap().lock().unwrap_err();
    assert!(matches!(refused.error, ImageError::InUse { .. }));
    drop(child.stdin.take());
    output.read_to_end(&mut said).unwrap();
    assert!(child.wait().unwrap().success());
    refused.image.lock().unwrap();
}

#[test]
fn nothing_reaches_beyond_the_end() {
    let (_directory, path) = scratch(4096);
    let image = locked(&path);
    let ram = GuestRam::allocate(2 << 20).unwrap();
    let slice = ram.memory().get_slice(GuestAddress(0), 1024).unwrap();
    for offset in [3584, 4096, u64::MAX] {
        assert!(image.write_vectored_at(&[slice], offset).is_err());
        assert!(image.read_vectored_at(&[slice], offset).is_err());
        assert!(image.discard(offset, 1024).is_err());
        assert!(image.write_zeroes(offset, 1024, false).is_err());
        assert!(image.read_at(&mut [0; 1024], offset).is_err());
    }
    image.write_vectored_at(&[slice], 3072).unwrap();
    image.flush().unwrap();
    image.invalidate_cache().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
}

#[test]
fn zeroes_are_written_where_the_kernel_cannot() {
    let (_directory, path) = scratch(1 << 20);
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    let image = locked(&path);
    image.write_zeroes_by_hand(512, 200_000).unwrap();
    image.write_zeroes(300 * 1024, 4096, false).unwrap();
    image.write_zeroes(400 * 1024, 8192, true).unwrap();
    image.write_zeroes(0, 0, true).unwrap();
    let content = fs::read(&path).unwrap();
    let zero = |at: usize| (512..200_512).contains(&at) || (307_200..311_296).contains(&at) || (409_600..417_792).contains(&at);
    assert!(content.iter().enumerate().all(|(at, &byte)| byte == if zero(at) { 0 } else { 7 }));
    let blocks = fs::metadata(&path).unwrap().blocks();
    image.discard(512 * 1024, 256 * 1024).unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() <= blocks);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
}

#[test]
fn many_pieces_are_read_and_marked() {
    let (_directory, path) = scratch(2 << 20);
    let content: Vec<u8> = (0..1500 * 512u32).map(|index| (index / 512) as u8).collect();
    let mut padded = content.clone();
    padded.resize(2 << 20, 0);
    fs::write(&path, padded).unwrap();
    let image = locked(&path);
    let ram = GuestRam::allocate(8 << 20).unwrap();
    // More pieces than one call takes, every other one empty, each at the start of a page.
    let piece = |index: u64| ram.memory().get_slice(GuestAddress(index / 2 * 4096), 512 * (index % 2) as usize).unwrap();
    let pieces: Vec<_> = (0..3000).map(piece).collect();
    image.read_vectored_at(&pieces, 0).unwrap();
    let mut dirty = PageSet::empty(ram.pages());
    ram.take_device_writes(&mut dirty);
    assert_eq!(dirty.runs().collect::<Vec<_>>(), [crate::memory::PageRun::new(0, 1500)]);
    image.write_vectored_at(&pieces, 512).unwrap();
    let mut back = vec![0; content.len()];
    image.read_at(&mut back, 512).unwrap();
    assert_eq!(back, content);
}

#[test]
fn a_file_that_shrank_is_an_error_and_all_of_the_buffer_is_marked() {
    let (_directory, path) = scratch(8192);
    let image = locked(&path);
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let ram = GuestRam::allocate(2 << 20).unwrap();
    let slice = ram.memory().get_slice(GuestAddress(0), 8192).unwrap();
    assert_eq!(image.read_vectored_at(&[slice], 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    let mut dirty = PageSet::empty(ram.pages());
    ram.take_device_writes(&mut dirty);
    assert_eq!(dirty.len(), 2);
}

#[test]
fn allocation_is_what_was_written_and_what_was_discarded() {
    let (_directory, path) = scratch(1 << 20);
    let image = locked(&path);
    let extents = |from: u64| {
        let mut at = from;
        std::iter::from_fn(|| {
            let extent = (at < 1 << 20).then(|| image.allocation(at, (1 << 20) - at).unwrap())?;
            at += extent.length;
            Some((extent.length, extent.kind))
        })
        .collect::<Vec<_>>()
    };
    assert_eq!(extents(0), [(1 << 20, ExtentKind::Hole)]);
    // Not on storage yet, and yet no hole.
    image.image.file.write_all_at(&[0; 8192], 65536).unwrap();
    let middle = (8192, ExtentKind::Data);
    assert_eq!(extents(0), [(65536, ExtentKind::Hole), middle, ((1 << 20) - 65536 - 8192, ExtentKind::Hole)]);
    assert_eq!(extents(65536 + 512)[0], (8192 - 512, ExtentKind::Data));
    assert_eq!(image.allocation(65536 - 512, 512).unwrap(), Extent { length: 512, kind: ExtentKind::Hole });
    assert_eq!(image.allocation(65536 - 512, 8192).unwrap(), Extent { length: 512, kind: ExtentKind::Hole });
    image.discard(65536, 4096).unwrap();
    assert_eq!(extents(0)[..2], [(65536 + 4096, ExtentKind::Hole), (4096, ExtentKind::Data)]);
    assert_eq!(image.allocation(1 << 20, 512).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
}

#[test]
fn direct_io_takes_buffers_at_any_address_and_past_the_page_cache() {
    let (_directory, path) = scratch(1 << 20);
    let image = Image::open(&path, false, CacheMode::None).unwrap().lock().unwrap();
    let ram = GuestRam::allocate(8 << 20).unwrap();
    let content: Vec<u8> = (0..65536u32).map(|index| (index % 253) as u8).collect();
    // An odd address, an odd end, and a whole page between.
    let pieces = [(1u64, 4095usize), (8192, 4096), (16_385, 57_345)];
    let slices = pieces.map(|(at, length)| ram.memory().get_slice(GuestAddress(at), length).unwrap());
    vectored::scatter(&slices, 0, &content);
    image.write_vectored_at(&slices, 512).unwrap();
    assert_eq!(fs::read(&path).unwrap()[512..66048], content);
    slices.iter().for_each(|slice| slice.copy_from(&[0u8; 57_345][..slice.len()]));
    ram.take_device_writes(&mut PageSet::empty(ram.pages()));
    image.read_vectored_at(&slices, 512).unwrap();
    let mut back = vec![0; 65536];
    vectored::gather(&slices, 0, &mut back);
    assert_eq!(back, content);
    let mut dirty = PageSet::empty(ram.pages());
    ram.take_device_writes(&mut dirty);
    assert_eq!(dirty.runs().map(|run| (run.first.0, run.count)).collect::<Vec<_>>(), [(0, 1), (2, 1), (4, 15)]);
    let mut small = [0; 1024];
    image.read_at(&mut small, 1024).unwrap();
    assert_eq!(small, content[512..1536]);
    image.write_zeroes_by_hand(1536, 1024).unwrap();
    image.write_zeroes(4096, 512, false).unwrap();
    image.flush().unwrap();
    let zeroed = fs::read(&path).unwrap();
    let expected = |at: usize| if (1536..2560).contains(&at) || (4096..4608).contains(&at) { 0 } else { content[at - 512] };
    assert!((512..66048).all(|at| zeroed[at] == expected(at)));
}

#[test]
fn where_direct_io_is_not_possible_it_is_said_why() {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::fd::AsRawFd;
    let open = |flags, size| {
        let file = memfd_create("image", flags).unwrap();
        ftruncate(&file, size).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        Image::open(Path::new(&path), false, CacheMode::None).map(drop).unwrap_err().to_string()
    };
    let error = open(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, 2 << 20);
    assert!(error.contains("without direct I/O, which cache=none needs; use cache=writeback"), "{error}");
    // Memory had none before Linux 6.6.
    let error = open(MemfdFlags::empty(), 5 * 512);
    assert!(error.contains("2560 bytes, which is not a whole number of blocks of 4096 bytes") || error.contains("without"), "{error}");
}
