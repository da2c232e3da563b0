// One range, not the numbers in it, is what is meant.
#![allow(clippy::single_range_in_vec_init)]

use proptest::prelude::*;

use super::*;
use crate::block::sidecar::StoredBitmap;

/// Everything that is alike goes together.
const ALL: RunLimits = RunLimits { zeroes: u64::MAX, ones: u64::MAX, words: u64::MAX };

fn granularity(bytes: u64) -> Granularity {
    Granularity::new(bytes).unwrap()
}

/// Single operations.
impl DirtyBitmaps {
    fn remove_alone(&self, name: &str) -> Result<(), BitmapError> {
        self.change(|held| held.remove(name))
    }

    fn clear_alone(&self, name: &str) -> Result<(), BitmapError> {
        self.change(|held| held.clear(name))
    }

    fn set_enabled_alone(&self, name: &str, enabled: bool) -> Result<(), BitmapError> {
        self.change(|held| held.set_enabled(name, enabled))
    }

    fn merge_alone(&self, target: &str, sources: &[&str]) -> Result<(), BitmapError> {
        self.change(|held| {
            let sources = sources.iter().map(|name| held.source(name)).collect::<Result<Vec<_>, _>>()?;
            held.merge(target, &sources)
        })
    }
}

#[test]
fn granularities_are_powers_of_two_within_limits() {
    for bytes in [512, 65536, 2 << 30] {
        assert_eq!(granularity(bytes).bytes(), bytes);
    }
    for bytes in [0, 1, 256, 513, 4 << 30, u64::MAX] {
        assert_eq!(Granularity::new(bytes), Err(BitmapError::Granularity(bytes)));
    }
    assert_eq!(Granularity::default().bytes(), 65536);
}

#[test]
fn operations_find_their_bitmap_or_say_why_not() {
    let bitmaps = DirtyBitmaps::new(1 << 20);
    bitmaps.add("a", Granularity::default(), true).unwrap();
    assert_eq!(bitmaps.add("a", Granularity::default(), true), Err(BitmapError::Exists("a".into())));
    assert_eq!(bitmaps.add("", Granularity::default(), true), Err(BitmapError::NoName));
    assert_eq!(bitmaps.add(&"n".repeat(1024), Granularity::default(), true), Err(BitmapError::LongName("n".repeat(1024))));
    let missing = Err(BitmapError::NotFound("b".into()));
    assert_eq!(bitmaps.remove_alone("b"), missing);
    assert_eq!(bitmaps.clear_alone("b"), missing);
    assert_eq!(bitmaps.set_enabled_alone("b", true), missing);
    assert_eq!(bitmaps.merge_alone("a", &["b"]), missing);
    bitmaps.mark(0, 1);
    assert_eq!(bitmaps.info()[0].count, 65536);
    bitmaps.set_enabled_alone("a", false).unwrap();
    bitmaps.mark(65536, 1);
    assert_eq!(bitmaps.info()[0].count, 65536);
    bitmaps.clear_alone("a").unwrap();
    assert_eq!(
        bitmaps.info()[0],
        BitmapInfo {
            name: "a".into(),
            granularity: Granularity::default(),
            recording: false,
            busy: false,
            persistent: false,
            inconsistent: false,
            count: 0
        }
    );
    bitmaps.remove_alone("a").unwrap();
    assert!(bitmaps.info().is_empty());
}

#[test]
fn the_words_are_qemu_s() {
    let bitmaps = DirtyBitmaps::new(1 << 20);
    bitmaps.add("a", granularity(512), true).unwrap();
    assert_eq!(BitmapError::NotFound("b".into()).to_string(), "Dirty bitmap 'b' not found");
    assert_eq!(bitmaps.add("a", granularity(512), true).unwrap_err().to_string(), "Bitmap already exists: a");
    let _outgoing = bitmaps.outgoing(|_| true);
    let busy = "Bitmap 'a' is currently in use by another operation and cannot be used";
    assert_eq!(bitmaps.clear_alone("a").unwrap_err().to_string(), busy);
    let small = DirtyBitmaps::new(1 << 19);
    small.add("s", granularity(512), true).unwrap();
    let source = small.hold().source("s").unwrap();
    bitmaps.add("t", granularity(512), true).unwrap();
    let sizes = "Bitmaps are of different sizes (destination size is 1048576, source size is 524288) and can't be merged";
    assert_eq!(bitmaps.change(|held| held.merge("t", &[source])).unwrap_err().to_string(), sizes);
}

#[test]
fn the_hash_is_that_of_little_endian_words() {
    let bitmaps = DirtyBitmaps::new(1 << 20);
    bitmaps.add("a", granularity(4096), true).unwrap();
    // 256 bits in four words; of 32 zero bytes, then with the first and the last bit set.
    assert_eq!(bitmaps.sha256("a").unwrap(), "66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925");
    bitmaps.mark(0, 1);
    bitmaps.mark((1 << 20) - 1, 1);
    let mut words = [0u8; 32];
    (words[0], words[31]) = (1, 0x80);
    assert_eq!(bitmaps.sha256("a").unwrap(), format!("{:x}", Sha256::digest(words)));
}

#[test]
fn an_inconsistent_bitmap_can_only_be_removed() {
    let bitmaps = DirtyBitmaps::new(1 << 20);
    bitmaps.restore(&StoredBitmap::listed("a", 4096)).unwrap();
    bitmaps.add("b", granularity(4096), true).unwrap();
    bitmaps.mark(0, 1);
    let info = &bitmaps.info()[0];
    assert!(info.inconsistent && info.persistent && !info.recording && !info.busy);
    assert_eq!(info.count, 0);
    let refusal = Err(BitmapError::Inconsistent("a".into()));
    assert_eq!(BitmapError::Inconsistent("a".into()).to_string(), "Bitmap 'a' is inconsistent and cannot be used");
    assert_eq!(bitmaps.clear_alone("a"), refusal);
    assert_eq!(bitmaps.set_enabled_alone("a", true), refusal);
    assert_eq!(bitmaps.set_enabled_alone("a", false), refusal);
    assert_eq!(bitmaps.merge_alone("a", &["b"]), refusal);
    assert_eq!(bitmaps.merge_alone("b", &["a"]), refusal);
    assert_eq!(bitmaps.dirty_ranges("a").unwrap_err(), BitmapError::Inconsistent("a".into()));
    let outgoing = bitmaps.outgoing(|_| true);
    assert_eq!(outgoing.iter().map(OutgoingBitmap::name).collect::<Vec<_>>(), ["b"]);
    bitmaps.remove_alone("a").unwrap();
}

#[test]
fn a_change_and_its_mark_are_one_to_an_operation() {
    let bitmaps = DirtyBitmaps::new(1 << 20);
    bitmaps.add("a", granularity(512), true).unwrap();
    let recording = bitmaps.recording();
    let clearing = std::thread::spawn({
        let bitmaps = bitmaps.clone();
        move || bitmaps.clear_alone("a").unwrap()
    });
    // Whether or not the other thread waits already, it clears after the mark.
    recording.mark(0, 512);
    clearing.join().unwrap();
    assert_eq!(bitmaps.info()[0].count, 0);
}

#[test]
fn memory_is_bounded() {
    let bitmaps = DirtyBitmaps::new(1 << 50);
    assert!(matches!(bitmaps.add("a", granularity(512), true), Err(BitmapError::TooLarge { .. })));
    // As in QEMU's iotest 199.
    let bitmaps = DirtyBitmaps::new(256 << 30);
    (0..15).for_each(|number| bitmaps.add(&number.to_string(), granularity(512), true).unwrap());
    let bitmaps = DirtyBitmaps::new(1 << 43);
    let added = (0..10_000).take_while(|number| bitmaps.add(&number.to_string(), granularity(1 << 20), false).is_ok()).count() as u64;
    assert!(added > 1000 && added * (1 << 20) <= MAX_BYTES);
}

#[test]
fn the_last_piece_counts_only_what_the_disk_has() {
    let bitmaps = DirtyBitmaps::new(65536 + 512);
    bitmaps.add("a", Granularity::default(), true).unwrap();
    bitmaps.mark(65536 + 511, 10_000);
    assert_eq!(bitmaps.info()[0].count, 512);
    assert_eq!(bitmaps.dirty_ranges("a").unwrap(), [65536..66048]);
    bitmaps.mark(u64::MAX, u64::MAX);
    bitmaps.mark(0, u64::MAX);
    assert_eq!(bitmaps.info()[0].count, 66048);
    bitmaps.clear_alone("a").unwrap();
    bitmaps.mark(0, 0);
    assert_eq!(bitmaps.info()[0].count, 0);
}

#[test]
fn a_migrating_bitmap_is_left_alone_and_goes_on_recording() {
    let source = DirtyBitmaps::new(1 << 20);
    source.add("a", granularity(4096), true).unwrap();
    let outgoing = source.outgoing(|_| true);
    let busy = Err(BitmapError::Busy("a".into()));
    assert_eq!(source.remove_alone("a"), busy);
    assert_eq!(source.clear_alone("a"), busy);
    assert_eq!(source.set_enabled_alone("a", false), busy);
    assert_eq!(source.merge_alone("a", &[]), busy);
    assert!(source.outgoing(|_| true).is_empty());
    source.mark(8192, 1);
    assert!(source.info()[0].busy && source.info()[0].recording);
    assert_eq!(outgoing[0].run(0, ALL), BitmapRun::Words([vec![4], vec![0; outgoing[0].words() as usize - 1]].concat()));
    // The migration failed: the bitmap is as if nothing had been.
    drop(outgoing);
    source.clear_alone("a").unwrap();
}

#[test]
fn runs_are_of_chunks_that_are_alike() {
    const CHUNK: usize = CHUNK_WORDS as usize;
    let words = [vec![0; 2 * CHUNK], vec![!0; 3 * CHUNK], vec![!0; CHUNK - 1], vec![5; 2 * CHUNK + 3], vec![0; 7]].concat();
    let runs = |limits| {
        let mut first = 0;
        std::iter::from_fn(|| {
            let run =
                (first < words.len()).then(|| BitmapRun::first_of(first as u64..words.len() as u64, limits, |index| words[index as usize]));
            first += run.as_ref().map_or(0, |run| run.count() as usize);
            run
        })
        .collect::<Vec<_>>()
    };
    let mixed = |range: std::ops::Range<usize>| BitmapRun::Words(words[range].to_vec());
    let tail = 5 * CHUNK;
    assert_eq!(runs(ALL), [BitmapRun::Zeroes(256), BitmapRun::Ones(384), mixed(tail..words.len())]);
    let small = RunLimits { zeroes: 128, ones: 256, words: 256 };
    let zeroes = BitmapRun::Zeroes(128);
    let ones = [BitmapRun::Ones(256), BitmapRun::Ones(128)];
    assert_eq!(runs(small), [&[zeroes.clone(), zeroes], &ones[..], &[mixed(tail..tail + 256), mixed(tail + 256..words.len())]].concat());
    let plain = RunLimits { zeroes: 256, ones: 0, words: 1024 };
    assert_eq!(runs(plain).iter().map(BitmapRun::count).collect::<Vec<_>>(), [256, words.len() as u64 - 256]);
}

#[test]
fn an_incoming_bitmap_is_complete_or_gone() {
    let target = DirtyBitmaps::new(1 << 30);
    let bitmap = || target.incoming("a", granularity(4096), true, false).unwrap();
    let mut incoming = bitmap();
    assert_eq!(target.incoming("a", granularity(4096), true, false).err(), Some(BitmapError::Exists("a".into())));
    // 4096 words in 32 chunks.
    assert_eq!(incoming.chunks(), 32);
    for (first, count) in [(1, 128), (0, 127), (4096, 128), (0, 0), (u64::MAX - 127, 128), (0, u64::MAX)] {
        assert!(matches!(incoming.load(first, &BitmapRun::Zeroes(count)), Err(BitmapError::Chunk { .. })), "{first}+{count}");
    }
    incoming.load(128, &BitmapRun::Words(vec![1; 128])).unwrap();
    incoming.load(256, &BitmapRun::Ones(4096 - 256)).unwrap();
    assert_eq!(incoming.complete(), Err(BitmapError::Incomplete { name: "a".into(), missing: 1 }));
    assert!(target.info().is_empty());
    drop(bitmap());
    assert!(target.info().is_empty());
    let mut incoming = bitmap();
    incoming.load(0, &BitmapRun::Zeroes(4096)).unwrap();
    incoming.complete().unwrap();
    assert!(target.info()[0].recording && !target.info()[0].busy);
    target.remove_alone("a").unwrap();
}

#[test]
fn a_disabled_bitmap_arrives_disabled() {
    let target = DirtyBitmaps::new(1 << 20);
    let mut incoming = target.incoming("a", Granularity::default(), false, false).unwrap();
    assert!(!target.info()[0].recording);
    target.mark(0, 1);
    // 16 bits; the source sets more, which are not on the disk.
    incoming.load(0, &BitmapRun::Words(vec![!0 << 4])).unwrap();
    incoming.complete().unwrap();
    target.mark(0, 1);
    assert_eq!(target.dirty_ranges("a").unwrap(), [4 * 65536..16 * 65536]);
    assert!(!target.info()[0].recording);
}

#[test]
fn nothing_is_lost_while_the_guest_writes_and_the_successor_is_merged() {
    let target = DirtyBitmaps::new(64 << 20);
    let mut incoming = target.incoming("a", granularity(512), true, false).unwrap();
    let words = (64u64 << 20) / 512 / 64;
    let writer = {
        let target = target.clone();
        std::thread::spawn(move || (0..words * 64).filter(|index| index % 3 == 0).for_each(|index| target.mark(index * 512, 512)))
    };
    for first in (0..words).step_by(CHUNK_WORDS as usize) {
        incoming.load(first, &BitmapRun::Zeroes(CHUNK_WORDS)).unwrap();
    }
    incoming.complete().unwrap();
    writer.join().unwrap();
    assert_eq!(target.info()[0].count, (words * 64).div_ceil(3) * 512);
}

proptest! {
    #[test]
    fn a_bitmap_arrives_exact(
        size in 1u64..20_000_000,
        before in prop::collection::vec((0u64..20_000_000, 0u64..100_000), 0..20),
        after in prop::collection::vec((0u64..20_000_000, 0u64..100_000), 0..20),
        complete_after in 0usize..20,
        limits in prop::sample::select(vec![ALL, RunLimits { zeroes: 256, ones: 0, words: 256 }]),
    ) {
        let (source, target) = (DirtyBitmaps::new(size), DirtyBitmaps::new(size));
        let expected = DirtyBitmaps::new(size);
        for bitmaps in [&source, &expected] {
            bitmaps.add("a", granularity(512), true).unwrap();
            before.iter().for_each(|&(offset, length)| bitmaps.mark(offset, length));
        }
        after.iter().for_each(|&(offset, length)| expected.mark(offset, length));
        let outgoing = source.outgoing(|_| true);
        let outgoing = &outgoing[0];
        let mut incoming = Some(target.incoming(outgoing.name(), outgoing.granularity(), outgoing.enabled(), false).unwrap());
        let finish = |mut incoming: IncomingBitmap| {
            let mut first = 0;
            while first < outgoing.words() {
                let run = outgoing.run(first, limits);
                incoming.load(first, &run).unwrap();
                first += run.count();
            }
            incoming.complete().unwrap();
        };
        for (index, &(offset, length)) in after.iter().enumerate() {
            if index == complete_after {
                finish(incoming.take().unwrap());
            }
            target.mark(offset, length);
        }
        if let Some(incoming) = incoming {
            finish(incoming);
        }
        prop_assert_eq!(target.dirty_ranges("a").unwrap(), expected.dirty_ranges("a").unwrap());
        prop_assert!(target.info()[0].recording && !target.info()[0].busy);
    }
}

proptest! {
    #[test]
    fn extents_are_the_ranges(size in 1u64..5_000_000, marks in prop::collection::vec((0u64..5_000_000, 0u64..100_000), 0..20), offset in 0u64..5_000_000, length in 1u64..5_000_000) {
        let bitmaps = DirtyBitmaps::new(size);
        bitmaps.add("a", granularity(512), true).unwrap();
        marks.iter().for_each(|&(offset, length)| bitmaps.mark(offset, length));
        let (offset, end) = (offset % size, (offset % size + length).min(size));
        let ranges = bitmaps.dirty_ranges("a").unwrap();
        let next = ranges.iter().find(|range| range.end > offset);
        let expected = match next {
            Some(range) if range.start <= offset => (range.end.min(end) - offset, true),
            Some(range) => (range.start.min(end) - offset, false),
            None => (end - offset, false),
        };
        prop_assert_eq!(bitmaps.copy("a").unwrap().extent(offset, end), expected);
    }
}
