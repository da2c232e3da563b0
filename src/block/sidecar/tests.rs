use proptest::prelude::*;

use super::*;
use crate::block::dirty_bitmap::{DirtyBitmaps, Granularity};

const IMAGE: ImageStamp = ImageStamp { size: 100 << 20, seconds: 1_700_000_000, nanoseconds: 123 };

fn bytes(contents: &Contents<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    contents.encode_to(&mut bytes).unwrap();
    bytes
}

/// One bitmap with bits and one without.
fn sidecar() -> Vec<u8> {
    let bitmaps = DirtyBitmaps::new(IMAGE.size);
    bitmaps.restore(&StoredBitmap::listed("lost", 4096)).unwrap();
    bitmaps.change(|held| held.add("kept", Granularity::new(65536).unwrap(), true, true)).unwrap();
    bitmaps.add("volatile", Granularity::default(), true).unwrap();
    bitmaps.mark(99 << 20, 5);
    bytes(&Contents { image: IMAGE, bitmaps: bitmaps.stored() })
}

#[test]
fn what_was_written_is_read() {
    let sidecar = sidecar();
    let contents = Contents::decode(&sidecar).unwrap();
    assert_eq!(contents.image, IMAGE);
    let [lost, kept] = &contents.bitmaps[..] else { panic!("{contents:?}") };
    assert_eq!((&*lost.name, lost.granularity, &lost.pieces), ("lost", 4096, &None));
    assert_eq!((&*kept.name, kept.granularity, kept.enabled), ("kept", 65536, true));
    let [piece] = &kept.pieces.as_ref().unwrap()[..] else { panic!("{kept:?}") };
    assert_eq!((piece.index, piece.bytes.len()), (0, 25 * 8));
    let restored = DirtyBitmaps::new(IMAGE.size);
    contents.bitmaps.iter().for_each(|bitmap| restored.restore(bitmap).unwrap());
    assert_eq!(restored.dirty_ranges("kept").unwrap(), std::slice::from_ref(&((99 << 20)..(99 << 20) + 65536)));
    assert!(restored.info()[0].inconsistent && !restored.info()[1].inconsistent);
}

#[test]
fn no_changed_bit_goes_unnoticed() {
    let sidecar = sidecar();
    for index in 0..sidecar.len() {
        for bit in 0..8 {
            let mut damaged = sidecar.clone();
            damaged[index] ^= 1 << bit;
            assert!(Contents::decode(&damaged).is_err(), "byte {index} bit {bit}");
        }
    }
}

#[test]
fn no_part_is_taken_for_the_whole() {
    let sidecar = sidecar();
    for length in 0..sidecar.len() {
        assert!(Contents::decode(&sidecar[..length]).is_err(), "{length} bytes");
    }
    assert!(Contents::decode(&[&sidecar[..], &[0]].concat()).is_err());
}

#[test]
fn another_version_says_so() {
    let mut newer = sidecar();
    newer[8] = 2;
    assert_eq!(Contents::decode(&newer).unwrap_err().to_string(), "it has format 2, and this Ferry knows 1");
}

/// With a checksum that is right, but bits that are not of this disk.
#[test]
fn pieces_of_another_disk_make_a_bitmap_inconsistent() {
    let words = |count: usize| Cow::Owned(vec![0xff; count * 8]);
    // 256 bits, four words.
    let cases = [(0, words(3)), (0, words(5)), (1, words(4)), (u64::MAX, words(4)), (0, Cow::Owned(vec![0xff; 31])), (0, words(0))];
    for (index, bytes) in cases {
        let bitmaps = DirtyBitmaps::new(1 << 20);
        let pieces = Some(vec![Piece { index: 0, bytes: words(4) }, Piece { index, bytes }]);
        bitmaps.restore(&StoredBitmap { name: "a".into(), granularity: 4096, enabled: true, pieces }).unwrap();
        let info = &bitmaps.info()[0];
        assert!(info.inconsistent && !info.recording && info.count == 0, "{info:?}");
    }
    let bitmaps = DirtyBitmaps::new(1 << 20);
    assert!(bitmaps.restore(&StoredBitmap::listed("a", 3)).is_err());
    assert!(bitmaps.restore(&StoredBitmap::listed("", 4096)).is_err());
}

proptest! {
    #[test]
    fn no_bytes_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Contents::decode(&body);
        let mut sealed = [&MAGIC[..], &VERSION.to_le_bytes(), &body].concat();
        let hash = Sha256::digest(&sealed);
        sealed.extend(hash);
        if let Ok(contents) = Contents::decode(&sealed) {
            let bitmaps = DirtyBitmaps::new(1 << 20);
            for bitmap in &contents.bitmaps {
                let _ = bitmaps.restore(bitmap);
            }
        }
    }
}
