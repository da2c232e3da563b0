//! What a snapshot keeps: the old contents of the clusters that were changed since.
//!
//! A change of the disk goes: old content to the temporary file, then the cluster's bit, then the change itself. So whoever has read a cluster
//! from the image and *then* finds its bit not set has read old content, and whoever finds it set reads the temporary file, which nothing
//! changes any more. Readers take no lock, and no writer waits for one.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::block::export_source::{Extent, ExtentKind};
use crate::block::image::LockedImage;

/// Bytes that are copied at once.
pub(super) const CLUSTER: u64 = 64 << 10;
const WORD_BITS: u64 = u64::BITS as u64;
static ZEROES: [u8; CLUSTER as usize] = [0; CLUSTER as usize];

/// Where the content of a snapshot is, for a range of it.
pub(super) enum Place {
    /// In the image, if it still is when it has been read.
    Image,
    /// In the temporary file, for good.
    Store,
}

/// The temporary file of one snapshot, as long as the image, and which clusters are in it.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) name: String,
    size: u64,
    file: File,
    copied: Box<[AtomicU64]>,
    /// Held by whoever copies clusters, with room for one of them.
    copying: Mutex<Box<[u8]>>,
    broken: OnceLock<String>,
    /// How many stores of the disk there are.
    stores: Arc<AtomicUsize>,
}

impl Drop for Store {
    fn drop(&mut self) {
        self.stores.fetch_sub(1, Ordering::Release);
        // Its last user may be a writer, for which the guest waits.
        self.free();
    }
}

impl Store {
    /// An empty one for an image of `size` bytes, counted in `stores`.
    pub(super) fn new(name: String, size: u64, file: File, stores: Arc<AtomicUsize>) -> Self {
        stores.fetch_add(1, Ordering::Relaxed);
        let words = size.div_ceil(CLUSTER).div_ceil(WORD_BITS);
        let copied = (0..words).map(|_| AtomicU64::new(0)).collect();
        let copying = Mutex::new(vec![0; CLUSTER as usize].into());
        Store { name, size, file, copied, copying, broken: OnceLock::new(), stores }
    }

    /// Keeps what `range` of the image has now. The range lies within the image and is about to change. An error breaks the snapshot and
    /// nothing else.
    pub(super) fn before_change(&self, image: &LockedImage, range: &Range<u64>) {
        let mut clusters = range.start / CLUSTER..range.end.div_ceil(CLUSTER);
        if self.broken.get().is_none() && !clusters.clone().all(|cluster| self.is_copied(cluster)) {
            let mut buffer = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
            // Looked at again: another writer may have broken it meanwhile.
            if self.broken.get().is_none()
                && let Err(error) = clusters.try_for_each(|cluster| self.copy(image, cluster, &mut buffer))
            {
                self.break_because(format!("what the guest was about to change could not be kept: {error}"));
                self.free();
            }
        }
        // The bits, or that it is broken, before the change, for the reader's fence.
        fence(Ordering::SeqCst);
    }

    fn copy(&self, image: &LockedImage, cluster: u64, buffer: &mut [u8]) -> io::Result<()> {
        if self.is_copied(cluster) {
            return Ok(());
        }
        let start = cluster * CLUSTER;
        let length = CLUSTER.min(self.size - start) as usize;
        let bytes = buffer.get_mut(..length).ok_or(ErrorKind::InvalidInput)?;
        image.read_at(bytes, start)?;
        // What is all zeros stays a hole.
        if ZEROES.get(..length) != Some(&*bytes) {
            self.file.write_all_at(bytes, start)?;
        }
        let word = self.copied.get((cluster / WORD_BITS) as usize).ok_or(ErrorKind::InvalidInput)?;
        word.fetch_or(1 << (cluster % WORD_BITS), Ordering::Release);
        Ok(())
    }

    fn is_copied(&self, cluster: u64) -> bool {
        let word = self.copied.get((cluster / WORD_BITS) as usize).map_or(0, |word| word.load(Ordering::Acquire));
        word >> (cluster % WORD_BITS) & 1 == 1
    }

    /// Ends the snapshot for its readers; the first reason stays.
    pub(super) fn break_because(&self, reason: String) {
        let _ = self.broken.set(reason);
    }

    /// Empties the file of a snapshot that is broken or has no user any more. On a thread that ends with that, because the guest may wait and a
    /// large file takes its time; what cannot be freed so is freed when the file is closed.
    fn free(&self) {
        if let Ok(file) = self.file.try_clone() {
            let _ = thread::Builder::new().name("free snapshot".into()).spawn(move || file.set_len(0));
        }
    }

    /// Why there is nothing more to read, if so.
    pub(super) fn broken(&self) -> Option<&str> {
        // What was read before this was not read from a file that is emptied, if it is not broken now.
        fence(Ordering::SeqCst);
        self.broken.get().map(String::as_str)
    }

    /// Where the beginning of `range` is, and up to which byte, at most the range's end, it is in the same place.
    pub(super) fn place(&self, range: &Range<u64>) -> (Place, u64) {
        let first = range.start / CLUSTER;
        let copied = self.is_copied(first);
        let next = (first + 1..range.end.div_ceil(CLUSTER)).find(|cluster| self.is_copied(*cluster) != copied);
        let end = next.map_or(range.end, |cluster| cluster * CLUSTER);
        (if copied { Place::Store } else { Place::Image }, end)
    }

    /// How much of the beginning of `range`, whose content was just read from the image or asked about there, is the snapshot's. In bytes.
    pub(super) fn unchanged(&self, range: &Range<u64>) -> u64 {
        // The reading before the bits, for the writer's fence.
        fence(Ordering::SeqCst);
        match self.place(range) {
            (Place::Image, end) => end - range.start,
            (Place::Store, _) => 0,
        }
    }

    /// Reads clusters that were copied.
    pub(super) fn read_at(&self, target: &mut [u8], offset: u64) -> io::Result<()> {
        let mut target = target;
        let mut offset = offset;
        while !target.is_empty() {
            match self.file.read_at(target, offset) {
                // Zeros that nobody wrote.
                Ok(0) => {
                    target.fill(0);
                    return Ok(());
                }
                Ok(count) => {
                    target = target.get_mut(count..).unwrap_or_default();
                    offset += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The first extent of clusters that were copied.
    pub(super) fn allocation(&self, range: &Range<u64>) -> Extent {
        let extent = |end: u64, kind| Extent { length: end.min(range.end) - range.start, kind };
        // Nobody uses the file's position, which this moves.
        match seek(&self.file, SeekFrom::Data(range.start)) {
            Ok(data) if data > range.start => extent(data, ExtentKind::Hole),
            Err(Errno::NXIO) => extent(range.end, ExtentKind::Hole),
            Ok(_) => match seek(&self.file, SeekFrom::Hole(range.start)) {
                Ok(hole) if hole > range.start => extent(hole, ExtentKind::Data),
                _ => extent(range.end, ExtentKind::Data),
            },
            Err(_) => extent(range.end, ExtentKind::Data),
        }
    }
}
