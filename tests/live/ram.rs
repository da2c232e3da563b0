//! A stopped guest's RAM, checked from outside: its process's memory against the guest's own tables in it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use ferry::memory::ram::{HOLE_END, HOLE_START};
use pagestorm::page::{self, Body, PAGE_MAGIC, PAGE_SIZE, Stamp, WORDS, Words};

use super::ferry::Ferry;
use super::guest::Guest;

/// Index of `writing` in a vCPU's record (`cpu_record.rs` of pagestorm).
const WRITING: usize = 5;

/// Every page must hold what the guest's table of generations says, but for the one that each vCPU was writing when it was stopped.
/// `bytes` is the guest's size. Returns how many pages were checked.
pub fn check(ferry: &Ferry, guest: &Guest, bytes: u64) -> u64 {
    assert_eq!(ferry.state(), "paused", "RAM that changes cannot be checked");
    let ram = Ram::of(ferry.process.id(), bytes);
    let records = guest.fact("filled", "cpu_records");
    let writing: Vec<u64> = (0..guest.fact("boot", "cpus")).map(|cpu| ram.words(records + cpu * PAGE_SIZE as u64)[WRITING]).collect();
    let generations = guest.fact("filled", "generations");
    let mut checked = 0;
    for (first, gpa, pages) in guest.segments() {
        for page in (first..first + pages).filter(|page| !writing.contains(page)) {
            let words = ram.words(gpa + (page - first) * PAGE_SIZE as u64);
            let generation = ram.word32(generations + page * 4);
            let stamp = Stamp { magic: PAGE_MAGIC, number: page, generation };
            let found = if generation == 0 { page::check_zero(&words) } else { page::check(&words, stamp, Body::Random) };
            found.unwrap_or_else(|damage| panic!("page {page} of generation {generation}: {damage:?}"));
            checked += 1;
        }
    }
    checked
}

/// Zeroes the first RAM of a running guest: its code, page tables and exception handlers, so that it cannot even say what has happened.
pub fn wipe(ferry: &Ferry, bytes: u64) {
    let ram = Ram::of(ferry.process.id(), bytes);
    // The process may have ended before all of it is written.
    assert!(ram.memory.write_at(&vec![0; 4 << 20], ram.base).unwrap() > 0);
}

/// How much of a process's guest RAM is in the host's memory, in bytes; of hugetlb memory nothing is counted here.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resident {
    /// All of it; the kernel's shared zero pages are none.
    pub bytes: u64,
    /// In transparent huge pages.
    pub huge: u64,
}

impl Resident {
    pub fn of(ferry: &Ferry) -> Self {
        mappings(ferry.process.id())
            .iter()
            .fold(Resident::default(), |sum, (_, resident)| Resident { bytes: sum.bytes + resident.bytes, huge: sum.huge + resident.huge })
    }
}

/// The mappings that guest RAM consists of: all of a process's memory that is kept out of core dumps (`dd` in proc(5)'s `smaps`).
fn mappings(process: u32) -> Vec<((u64, u64), Resident)> {
    let map = std::fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let (mut range, mut resident) = ((0, 0), Resident::default());
    let mut found = Vec::new();
    for line in map.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        let bytes = || line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024;
        if let Some((start, end)) = first.split_once('-') {
            range = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
        }
        match first {
            "Rss:" => resident.bytes = bytes(),
            "AnonHugePages:" => resident.huge = bytes(),
            "VmFlags:" if line.split_whitespace().any(|flag| flag == "dd") && line.contains(" rd wr ") && !line.contains(" sh ") => {
                found.push((range, resident));
            }
            _ => {}
        }
    }
    found
}

struct Ram {
    memory: File,
    /// Address of its first byte in the process.
    base: u64,
}

impl Ram {
    fn of(process: u32, bytes: u64) -> Self {
        let found: Vec<_> = mappings(process).into_iter().map(|(range, _)| range).collect();
        let base = found.first().expect("no memory that is kept out of core dumps").0;
        assert!(found.windows(2).all(|pair| pair[0].1 == pair[1].0), "RAM has holes: {found:x?}");
        assert_eq!(found.last().unwrap().1 - base, bytes, "{found:x?}");
        Ram { memory: File::options().read(true).write(true).open(format!("/proc/{process}/mem")).unwrap(), base }
    }

    fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let offset = if gpa < HOLE_START { gpa } else { gpa - HOLE_END + HOLE_START };
        let mut bytes = [0; N];
        self.memory.read_exact_at(&mut bytes, self.base + offset).unwrap();
        bytes
    }

    fn words(&self, gpa: u64) -> Words {
        let bytes = self.read::<PAGE_SIZE>(gpa);
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap());
        }
        words
    }

    fn word32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.read(gpa))
    }
}
