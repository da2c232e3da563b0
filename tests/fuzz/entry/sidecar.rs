//! The file beside an image that keeps its dirty bitmaps.

use ferry::block::dirty_bitmap::DirtyBitmaps;
use ferry::block::sidecar::{Contents, ImageStamp};
use sha2::{Digest, Sha256};

use super::allocation::{proportionate, within};

/// Of which a stored bitmap is at most 1 KiB of bits.
const DISK: u64 = 4 << 20;

pub fn run(data: &[u8]) {
    check(data);
    // As if it had been written so: otherwise hardly anything gets past the checksum.
    let sealed = [data, &Sha256::digest(data)[..]].concat();
    check(&sealed);
}

fn check(bytes: &[u8]) {
    let Ok(contents) = within(proportionate(bytes.len()), || Contents::decode(bytes)) else { return };
    let bitmaps = DirtyBitmaps::new(DISK);
    for bitmap in &contents.bitmaps {
        let _ = bitmaps.restore(bitmap);
    }
    for (info, stored) in bitmaps.info().iter().zip(bitmaps.stored()) {
        assert!(info.persistent && (info.inconsistent || info.count <= DISK));
        assert_eq!(info.inconsistent, stored.pieces.is_none());
    }
    let image = ImageStamp { size: DISK, seconds: 0, nanoseconds: 0 };
    let (mut first, mut second) = (Vec::new(), Vec::new());
    Contents { image, bitmaps: bitmaps.stored() }.encode_to(&mut first).expect("memory");
    let again = DirtyBitmaps::new(DISK);
    Contents::decode(&first).expect("what was encoded").bitmaps.iter().for_each(|bitmap| again.restore(bitmap).expect("it was there"));
    Contents { image, bitmaps: again.stored() }.encode_to(&mut second).expect("memory");
    assert_eq!(first, second);
}
