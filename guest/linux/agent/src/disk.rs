//! Writes files on ext4, and checks them by reading past the page cache.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use crate::pattern::{as_bytes, as_bytes_mut, Page};
use crate::report::{failure, FILES_CHECKED, FILES_WRITTEN};
use crate::stop::stopping;

const MOUNT_POINT: &str = "/mnt";
const FILES: u64 = 16;
/// 256 KiB a file.
const PAGES_PER_FILE: u64 = 64;
/// Between two files, so that the disk does not take the memory's share of the processor.
const PAUSE: Duration = Duration::from_millis(10);

/// Works on `device` until asked to stop, checks every file a last time, and unmounts.
pub fn run(device: &str) {
    let result = mount(device).and_then(|()| {
        let worked = work();
        let unmounted = unmount();
        worked.and(unmounted)
    });
    if let Err(error) = result {
        failure("disk", &format!("{device}: {error}"));
    }
}

fn mount(device: &str) -> Result<(), String> {
    let c_string = |text: &str| CString::new(text).map_err(|error| error.to_string());
    let (source, target, kind) = (c_string(device)?, c_string(MOUNT_POINT)?, c_string("ext4")?);
    // SAFETY: the three strings outlive the call; ext4 takes no data here.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(format!(
        "cannot mount it as ext4 (mke2fs -t ext4 makes one): {}",
        io::Error::last_os_error()
    ))
}

fn unmount() -> Result<(), String> {
    let target = CString::new(MOUNT_POINT).map_err(|error| error.to_string())?;
    // SAFETY: the string outlives the call.
    match unsafe { libc::umount(target.as_ptr()) } {
        0 => Ok(()),
        _ => Err(format!("cannot unmount it: {}", io::Error::last_os_error())),
    }
}

/// The files are overwritten in turn; `generations` has what each must hold, 0 for no such file yet.
fn work() -> Result<(), String> {
    let mut generations = [0_u64; FILES as usize];
    // An earlier run of the guest may have left files: whatever had its final name must be whole.
    for (file, generation) in generations.iter_mut().enumerate() {
        let pages = match read(file as u64) {
            Ok(pages) => pages,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(format!("cannot read {}: {error}", path(file as u64).display())),
        };
        *generation = pages.first().map_or(0, Page::generation);
        check(file as u64, *generation, &pages)?;
    }

    let mut newest = generations.iter().copied().max().unwrap_or_default();
    let mut turn = 0;
    while !stopping() {
        newest += 1;
        let file = turn % FILES;
        write(file, newest).map_err(|error| format!("cannot write {}: {error}", path(file).display()))?;
        FILES_WRITTEN.fetch_add(1, Relaxed);
        generations[file as usize] = newest;
        read_and_check(file, newest)?;
        // The file that is overwritten next has been on the disk the longest.
        turn += 1;
        let oldest = turn % FILES;
        read_and_check(oldest, generations[oldest as usize])?;
        thread::sleep(PAUSE);
    }
    (0..FILES).try_for_each(|file| read_and_check(file, generations[file as usize]))
}

fn path(file: u64) -> PathBuf {
    PathBuf::from(format!("{MOUNT_POINT}/data.{file}"))
}

/// A page's number within the whole of the files.
fn page_number(file: u64, index: u64) -> u64 {
    file << 32 | index
}

/// Replaces a file: whole under another name, on the disk, and only then renamed.
fn write(file: u64, generation: u64) -> io::Result<()> {
    let mut pages = vec![Page::ZERO; PAGES_PER_FILE as usize];
    for (index, page) in pages.iter_mut().enumerate() {
        page.fill(page_number(file, index as u64), generation);
    }
    let new = path(file).with_extension("new");
    let mut output = File::create(&new)?;
    output.write_all(as_bytes(&pages))?;
    output.sync_all()?;
    fs::rename(&new, path(file))?;
    File::open(MOUNT_POINT)?.sync_all()
}

/// The file's pages, from the device and not from the page cache.
fn read(file: u64) -> io::Result<Vec<Page>> {
    let mut input = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path(file))?;
    let mut pages = vec![Page::ZERO; PAGES_PER_FILE as usize];
    input.read_exact(as_bytes_mut(&mut pages))?;
    Ok(pages)
}

fn read_and_check(file: u64, generation: u64) -> Result<(), String> {
    if generation == 0 {
        return Ok(());
    }
    let pages = read(file).map_err(|error| format!("cannot read {}: {error}", path(file).display()))?;
    check(file, generation, &pages)
}

fn check(file: u64, generation: u64, pages: &[Page]) -> Result<(), String> {
    FILES_CHECKED.fetch_add(1, Relaxed);
    for (index, page) in pages.iter().enumerate() {
        page.check(page_number(file, index as u64), generation)
            .map_err(|error| format!("{}: {error}", path(file).display()))?;
    }
    Ok(())
}
