//! A disk's image, checked from outside.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ferry::block::disk::Disk;
use ferry::vm::config::DiskConfig;
use pagestorm::page::{self, Body, PAGE_SIZE, Stamp, WORDS, Words, mix};
use sha2::{Digest, Sha256};

/// A file system that is soon full. Mounting takes root.
pub struct SmallStorage(PathBuf);

impl SmallStorage {
    pub fn mount(path: PathBuf) -> Self {
        std::fs::create_dir(&path).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=6M", "ferry-test"], &path);
        SmallStorage(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn make_room(&self) {
        run("mount", &["-o", "remount,size=64M"], &self.0);
    }
}

impl Drop for SmallStorage {
    fn drop(&mut self) {
        // At once, also while a Ferry that a failed test left behind has a file open.
        run("umount", &["--lazy"], &self.0);
    }
}

fn run(program: &str, arguments: &[&str], path: &Path) {
    let output = Command::new(program).args(arguments).arg(path).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A raw image.
pub struct TestDisk {
    pub path: PathBuf,
    bytes: u64,
}

/// The image's blocks at one moment.
pub struct Snapshot(Vec<Box<Words>>);

impl TestDisk {
    /// An image that somebody else has made.
    pub fn at(path: &Path, bytes: u64) -> Self {
        TestDisk { path: path.into(), bytes }
    }

    pub fn create(path: PathBuf, bytes: u64) -> Self {
        File::create(&path).unwrap().set_len(bytes).unwrap();
        TestDisk { path, bytes }
    }

    /// Whether nobody has it.
    pub fn is_free(&self) -> bool {
        let config = DiskConfig { id: "root".into(), path: self.path.clone(), readonly: false, options: Default::default() };
        Disk::open(config).unwrap().acquire().is_ok()
    }

    pub fn snapshot(&self) -> Snapshot {
        let file = File::open(&self.path).unwrap();
        let mut block = [0; PAGE_SIZE];
        let blocks = (0..self.bytes / PAGE_SIZE as u64).map(|number| {
            file.read_exact_at(&mut block, number * PAGE_SIZE as u64).unwrap();
            let mut words = Box::new([0; WORDS]);
            for (word, bytes) in words.iter_mut().zip(block.chunks_exact(8)) {
                *word = u64::from_le_bytes(bytes.try_into().unwrap());
            }
            words
        });
        Snapshot(blocks.collect())
    }
}

impl Snapshot {
    /// Every block that was ever written in the run with this `magic` must be whole; how many there are, and their digest as pagestorm
    /// computes it.
    pub fn check(&self, magic: u64) -> (u64, u64) {
        let (mut count, mut digest) = (0, 0u64);
        for (number, words) in self.0.iter().enumerate().filter(|(_, words)| words[3] == magic) {
            let generation = u32::try_from(words[1]).unwrap();
            let stamp = Stamp { magic, number: number as u64, generation };
            page::check(words, stamp, Body::Random).unwrap_or_else(|damage| panic!("block {number}: {damage:?}"));
            count += 1;
            digest = digest.wrapping_add(mix(mix(number as u64) ^ u64::from(generation)));
        }
        (count, digest)
    }

    /// How many pieces of `granularity` bytes differ from `before`.
    pub fn changed(&self, before: &Snapshot, granularity: u64) -> usize {
        self.changed_pieces(before, granularity).len()
    }

    /// Which pieces of `granularity` bytes differ from `before`. The guest writes whole pages.
    pub fn changed_pieces(&self, before: &Snapshot, granularity: u64) -> BTreeSet<u64> {
        let changed = self.0.iter().zip(&before.0).enumerate().filter(|(_, (now, before))| now != before);
        let pieces = |page: u64| page * PAGE_SIZE as u64 / granularity..=((page + 1) * PAGE_SIZE as u64 - 1) / granularity;
        changed.flat_map(|(number, _)| pieces(number as u64)).collect()
    }

    /// The numbers of the blocks that differ from `before`, but not because the guest with this `magic` has written them.
    pub fn changed_by_others(&self, before: &Snapshot, magic: u64) -> Vec<usize> {
        let blocks = self.0.iter().zip(&before.0).enumerate();
        blocks.filter(|(_, (now, before))| now != before && now[3] != magic).map(|(number, _)| number).collect()
    }

    /// The hash of the bitmap, as QEMU has it, in which what differs from `before` is set.
    pub fn bitmap_sha256(&self, before: &Snapshot, granularity: u64) -> String {
        let bits = self.0.len() as u64 * PAGE_SIZE as u64 / granularity;
        let mut bytes = vec![0u8; bits.div_ceil(64) as usize * 8];
        for piece in self.changed_pieces(before, granularity) {
            bytes[piece as usize / 8] |= 1 << (piece % 8);
        }
        format!("{:x}", Sha256::digest(&bytes))
    }
}
