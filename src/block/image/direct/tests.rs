use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;

const SIZE: usize = 4 << 20;

/// A file open for direct I/O, with alignments that suit any disk.
fn file() -> (tempfile::TempDir, File, Direct) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    File::create(&path).unwrap().set_len(SIZE as u64).unwrap();
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
    let actual = Direct::of(&file).unwrap().unwrap();
    assert!(actual.block <= 4096 && actual.memory <= 4096, "{actual:?}");
    (directory, file, Direct { memory: 4096, block: 4096, changes: RwLock::default() })
}

fn ranges() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let range = (0..SIZE / 512).prop_flat_map(|first| (Just(first), 1..=(SIZE / 512 - first).min(5000)));
    prop::collection::vec(range, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn any_range_of_sectors_is_read_and_written(ranges in ranges()) {
        let (_directory, file, direct) = file();
        let mut model = vec![0; SIZE];
        for (byte, (first, count)) in (1u8..).zip(ranges) {
            let range = first * 512..(first + count) * 512;
            let mut at = 0;
            let fill = |bytes: &mut [u8]| {
                for target in bytes {
                    *target = byte ^ (at / 512) as u8;
                    at += 1;
                }
            };
            direct.write(&file, range.start as u64, range.len() as u64, fill).unwrap();
            for (at, target) in model[range.clone()].iter_mut().enumerate() {
                *target = byte ^ (at / 512) as u8;
            }
            // A sector on either side is to be as it was.
            let around = range.start.saturating_sub(512)..(range.end + 512).min(SIZE);
            let mut back = Vec::new();
            direct.read(&file, around.start as u64, around.len() as u64, |bytes| back.extend_from_slice(bytes)).unwrap();
            prop_assert!(back == model[around.clone()], "{around:?}");
        }
    }
}

#[test]
fn writers_of_one_block_do_not_lose_each_other_s_sectors() {
    let (_directory, file, direct) = file();
    let shared = Arc::new((file, direct));
    let writer = |sector: u64| {
        let shared = shared.clone();
        std::thread::spawn(move || {
            for round in 1..=200u8 {
                shared.1.write(&shared.0, sector * 512, 512, |bytes| bytes.fill(round)).unwrap();
                shared.1.read(&shared.0, sector * 512, 512, |bytes| assert_eq!(bytes, [round; 512])).unwrap();
            }
        })
    };
    for thread in [0, 1, 7].map(writer) {
        thread.join().unwrap();
    }
}
