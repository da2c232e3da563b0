use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::VolatileSlice;

use super::*;
use crate::block::SECTOR_SIZE;
use crate::block::dirty_bitmap::Granularity;
use crate::block::disk::{Disk, DiskIo};
use crate::block::image::Image;
use crate::vm::config::{CacheMode, DiscardMode, DiskConfig, DiskOptions};

const BLOCK: usize = COPY_BLOCK as usize;
/// 20 blocks and a last one of three sectors.
const SIZE: u64 = 20 * COPY_BLOCK + 3 * SECTOR_SIZE;
const BLOCKS: u64 = 21;
const LIMIT: Duration = Duration::from_secs(20);

struct Bench {
    disk: Arc<Disk>,
    io: DiskIo,
    path: PathBuf,
    _directory: TempDir,
}

impl Bench {
    fn new(cache: CacheMode) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        let options = DiskOptions { cache, discard: DiscardMode::Unmap, ..DiskOptions::default() };
        let size = if cache == CacheMode::None { SIZE.next_multiple_of(COPY_BLOCK) } else { SIZE };
        let disk = Disk::create(DiskConfig { id: "root".into(), path: path.clone(), readonly: false, options }, size).unwrap();
        let io = disk.io().unwrap();
        Bench { disk, io, path, _directory: directory }
    }

    /// All of it missing, and who is asked.
    fn empty() -> (Self, Receiver<BlockRun>) {
        let bench = Self::new(CacheMode::Writeback);
        let (ask, asked) = unbounded();
        bench.arriving().expect([BlockRun::new(0, BLOCKS)], asking(ask));
        (bench, asked)
    }

    fn arriving(&self) -> &Arc<Arriving> {
        self.disk.arriving().unwrap()
    }

    fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0xee; length];
        self.io.read(&[VolatileSlice::from(bytes.as_mut_slice())], offset).map(|()| bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.io.write(&[VolatileSlice::from(bytes.to_vec().as_mut_slice())], offset)
    }
}

fn asking(ask: Sender<BlockRun>) -> impl Fn(BlockRun) + Send + Sync + 'static {
    move |run| ask.send(run).unwrap_or_default()
}

fn run(first: u64, count: u64) -> BlockRun {
    BlockRun::new(first, count)
}

#[test]
fn what_comes_before_the_switch_is_written_whatever_was_there() {
    let bench = Bench::new(CacheMode::Writeback);
    let arriving = bench.arriving();
    arriving.place(run(1, 2), &[1; 2 * BLOCK]).unwrap();
    arriving.place(run(2, 1), &[2; BLOCK]).unwrap();
    arriving.place(run(20, 1), &[3; BLOCK]).unwrap();
    arriving.place_zeroes(run(1, 1)).unwrap();
    assert_eq!((arriving.missing_blocks(), arriving.is_complete()), (BLOCKS, false));
    for (run, length) in [(run(21, 1), BLOCK), (run(20, 2), 2 * BLOCK), (run(u64::MAX, 1), BLOCK), (run(0, 1), 1), (run(0, u64::MAX), 0)] {
        assert_eq!(arriving.place(run, &vec![9; length]).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{run:?}");
    }
    assert!(arriving.place_zeroes(run(0, 22)).is_err());
    arriving.expect([], |_| panic!("nothing is missing"));
    assert_eq!((arriving.missing_blocks(), arriving.is_complete()), (0, true));
    let mut expected = vec![0; SIZE as usize];
    expected[2 * BLOCK..3 * BLOCK].fill(2);
    expected[20 * BLOCK..].fill(3);
    bench.disk.keep().unwrap();
    assert!(fs::read(&bench.path).unwrap() == expected);
    arriving.place(run(2, 1), &[9; BLOCK]).unwrap();
    assert!(bench.read(0, SIZE as usize).unwrap() == expected);
}

#[test]
fn a_read_asks_once_and_waits_for_all_of_its_blocks() {
    let (bench, asked) = Bench::empty();
    bench.arriving().place(run(1, 1), &[1; BLOCK]).unwrap();
    assert_eq!(bench.read(COPY_BLOCK, BLOCK).unwrap(), [1; BLOCK]);
    thread::scope(|scope| {
        let reader = scope.spawn(|| bench.read(512, 4 * BLOCK).unwrap());
        assert_eq!([asked.recv_timeout(LIMIT).unwrap(), asked.recv_timeout(LIMIT).unwrap()], [run(0, 1), run(2, 3)]);
        bench.arriving().place(run(2, 4), &[2; 4 * BLOCK]).unwrap();
        bench.arriving().place_zeroes(run(0, 1)).unwrap();
        let content = reader.join().unwrap();
        assert!(content[..BLOCK - 512].iter().all(|byte| *byte == 0) && content[2 * BLOCK..] == [2; 2 * BLOCK]);
    });
    assert!(asked.try_recv().is_err());
    assert_eq!(bench.arriving().missing_blocks(), BLOCKS - 6);
}

#[test]
fn what_is_written_as_a_whole_waits_for_nothing_and_is_not_overwritten() {
    let (bench, asked) = Bench::empty();
    bench.write(3 * COPY_BLOCK, &[7; 2 * BLOCK]).unwrap();
    bench.write(20 * COPY_BLOCK, &[8; 3 * 512]).unwrap();
    bench.io.write_zeroes(COPY_BLOCK, COPY_BLOCK, false).unwrap();
    bench.io.discard(2 * COPY_BLOCK, COPY_BLOCK).unwrap();
    assert_eq!(bench.arriving().missing_blocks(), BLOCKS - 5);
    bench.arriving().place(run(0, BLOCKS), &[1; 21 * BLOCK]).unwrap();
    assert!(asked.try_recv().is_err() && bench.arriving().is_complete());
    let content = bench.read(0, SIZE as usize).unwrap();
    let expected = [1, 0, 0, 7, 7, 1];
    assert!(expected.iter().enumerate().all(|(at, byte)| content[at * BLOCK..][..BLOCK].iter().all(|found| found == byte)));
    assert_eq!(content[20 * BLOCK..], [8; 3 * 512]);
}

#[test]
fn what_is_written_in_part_waits_for_what_was_there() {
    let (bench, asked) = Bench::empty();
    thread::scope(|scope| {
        let writer = scope.spawn(|| bench.write(512, &[7; 2 * BLOCK]).unwrap());
        assert_eq!([asked.recv_timeout(LIMIT).unwrap(), asked.recv_timeout(LIMIT).unwrap()], [run(0, 1), run(2, 1)]);
        // A request that waits keeps nobody from the bitmaps.
        bench.disk.bitmaps().add("b", Granularity::default(), true).unwrap();
        bench.arriving().place(run(0, 3), &[1; 3 * BLOCK]).unwrap();
        writer.join().unwrap();
    });
    let content = bench.read(0, 3 * BLOCK).unwrap();
    assert_eq!((content[511], content[512], content[2 * BLOCK + 511], content[2 * BLOCK + 512]), (1, 7, 7, 1));
    assert!(asked.try_recv().is_err());
}

#[test]
fn a_write_that_fails_gives_its_blocks_back_to_what_arrives() {
    let (bench, _asked) = Bench::empty();
    let while_claimed = |block: u64, end: &dyn Fn(Claim<'_>)| {
        let claim = bench.arriving().before_write(run(block, 1).bytes(SIZE)).unwrap().unwrap();
        // While it is held nobody else claims any of it, nor anything together with it.
        assert!([run(block, 1), run(block - 1, 3)].iter().all(|run| bench.arriving().state().claim(*run).is_none()));
        thread::scope(|scope| {
            let arrival = scope.spawn(|| bench.arriving().place(run(block - 1, 3), &[1; 3 * BLOCK]));
            end(claim);
            arrival.join().unwrap().unwrap();
        });
    };
    while_claimed(2, &|claim| drop(claim));
    while_claimed(6, &|claim| claim.settle());
    assert_eq!(bench.arriving().missing_blocks(), BLOCKS - 6);
    let content = bench.read(COPY_BLOCK, 3 * BLOCK).unwrap();
    assert_eq!(content, [1; 3 * BLOCK]);
    let content = bench.read(5 * COPY_BLOCK, 3 * BLOCK).unwrap();
    // What the holder of the claim had written: nothing.
    assert_eq!([content[0], content[BLOCK], content[2 * BLOCK]], [1, 0, 1]);
}

#[test]
fn an_arrival_that_fails_leaves_its_blocks_missing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let image = Arc::new(Image::open(&path, true, CacheMode::Writeback).unwrap().lock().unwrap());
    let arriving = Arriving::new(SIZE, &image);
    arriving.expect([run(0, 2)], |_| {});
    assert_eq!(arriving.place(run(0, 1), &[1; BLOCK]).unwrap_err().raw_os_error(), Some(libc::EBADF));
    assert_eq!(arriving.missing_blocks(), 2);
    drop(image);
    assert_eq!(arriving.place_zeroes(run(0, 1)).unwrap_err().raw_os_error(), Some(libc::ESHUTDOWN));
    assert!(arriving.state().claimed.is_empty());
}

#[test]
fn nobody_waits_for_what_will_never_come() {
    let (bench, asked) = Bench::empty();
    thread::scope(|scope| {
        let reader = scope.spawn(|| bench.read(0, BLOCK).unwrap_err().to_string());
        asked.recv_timeout(LIMIT).unwrap();
        bench.arriving().abandon("the source is gone");
        assert!(reader.join().unwrap().contains("never arrived: the source is gone"));
    });
    assert!(bench.write(512, &[1; 512]).is_err());
    bench.write(0, &[1; BLOCK]).unwrap();
    assert_eq!(bench.read(0, BLOCK).unwrap(), [1; BLOCK]);
}

#[test]
fn many_missing_blocks_are_asked_for_in_parts() {
    let runs: Vec<_> = in_requests([run(5, 1025), run(9000, 512), run(0, 0)].into_iter());
    assert_eq!(runs, [run(5, 512), run(517, 512), run(1029, 1), run(9000, 512)]);
}

#[test]
fn nobody_but_the_guest_uses_a_disk_that_is_not_all_here() {
    let (bench, _asked) = Bench::empty();
    assert_eq!(bench.disk.with_io(|_| Ok(())).unwrap_err().raw_os_error(), Some(libc::ESHUTDOWN));
    let refused = bench.disk.check_available().unwrap_err().to_string();
    assert_eq!(refused, "disk root: it has not wholly arrived from the source yet; try again when the migration has completed");
    let snapshot = crate::block::snapshot::PreparedSnapshot::new(&bench.disk, "s").map(drop).unwrap_err();
    assert_eq!(snapshot.to_string(), refused);
    bench.arriving().place_zeroes(run(0, BLOCKS)).unwrap();
    bench.disk.with_io(|_| Ok(())).unwrap();
}

#[test]
fn blocks_arrive_in_an_image_with_direct_io() {
    let bench = Bench::new(CacheMode::None);
    let arriving = bench.arriving();
    arriving.place(run(0, 2), &[1; 2 * BLOCK]).unwrap();
    arriving.expect([run(1, 2)], |_| {});
    bench.write(2 * COPY_BLOCK, &[7; BLOCK]).unwrap();
    arriving.place(run(1, 2), &[2; 2 * BLOCK]).unwrap();
    let content = bench.read(0, 3 * BLOCK).unwrap();
    assert_eq!([content[0], content[BLOCK], content[2 * BLOCK]], [1, 2, 7]);
}

#[derive(Clone, Debug)]
enum Request {
    Read,
    Write(u8),
    WriteZeroes,
    Discard,
}

/// A request of the guest, with its first sector and how many there are.
fn request() -> impl Strategy<Value = (Request, u64, u64)> {
    let sectors = SIZE / SECTOR_SIZE;
    let kind = prop_oneof![
        3 => Just(Request::Read),
        5 => (100u8..200).prop_map(Request::Write),
        1 => Just(Request::WriteZeroes),
        1 => Just(Request::Discard),
    ];
    // Often whole blocks.
    let aligned = (0..BLOCKS, 1..4u64).prop_map(|(first, count)| (first * 8, count * 8));
    let range = prop_oneof![aligned, (0..sectors, 1..40u64)];
    (kind, range).prop_map(move |(kind, (first, count))| (kind, first, count.min(sectors - first)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn the_guest_sees_its_disk_while_the_blocks_arrive(
        missing in prop::collection::vec(any::<bool>(), BLOCKS as usize),
        zero in prop::collection::vec(any::<bool>(), BLOCKS as usize),
        order in Just((0..BLOCKS).collect::<Vec<_>>()).prop_shuffle(),
        lengths in prop::collection::vec(1..4u64, BLOCKS as usize),
        requests in prop::collection::vec(request(), 1..60),
    ) {
        let bench = Bench::new(CacheMode::Writeback);
        let arriving = bench.arriving();
        let content = |block: u64| if zero[block as usize] { 0 } else { block as u8 + 1 };
        let of_source: Vec<u8> = (0..BLOCKS).flat_map(|block| [content(block); BLOCK]).collect();
        for block in 0..BLOCKS {
            // Of what is missing there is something old.
            let sent = if missing[block as usize] { 0xff } else { content(block) };
            arriving.place(run(block, 1), &[sent; BLOCK]).unwrap();
        }
        bench.disk.bitmaps().add("b", Granularity::new(512).unwrap(), true).unwrap();
        let (ask, asked) = unbounded();
        arriving.expect((0..BLOCKS).filter(|block| missing[*block as usize]).map(|block| run(block, 1)), asking(ask));
        let place = |part: BlockRun| {
            let bytes = &of_source[part.first as usize * BLOCK..part.end() as usize * BLOCK];
            if bytes.iter().all(|byte| *byte == 0) {
                arriving.place_zeroes(part).unwrap();
            } else {
                arriving.place(part, bytes).unwrap();
            }
        };
        let mut model = of_source[..SIZE as usize].to_vec();
        let mut dirty = vec![false; (SIZE / SECTOR_SIZE) as usize];
        thread::scope(|scope| {
            scope.spawn(|| {
                // The background, and meanwhile what is asked for, at the same time.
                for (first, length) in order.iter().zip(&lengths) {
                    asked.try_iter().for_each(place);
                    place(BlockRun::between(*first, (first + length).min(BLOCKS)));
                    thread::yield_now();
                }
            });
            for (request, first, count) in &requests {
                let (offset, length) = (first * SECTOR_SIZE, count * SECTOR_SIZE);
                let range = offset as usize..(offset + length) as usize;
                if let Request::Read = request {
                    assert!(bench.read(offset, length as usize).unwrap() == model[range], "{first}+{count}");
                    continue;
                }
                dirty[*first as usize..(first + count) as usize].fill(true);
                match request {
                    Request::Write(byte) => {
                        bench.write(offset, &vec![*byte; length as usize]).unwrap();
                        model[range].fill(*byte);
                    }
                    Request::WriteZeroes => {
                        bench.io.write_zeroes(offset, length, true).unwrap();
                        model[range].fill(0);
                    }
                    // Which is zeros in a file of a file system with holes.
                    _ => {
                        bench.io.discard(offset, length).unwrap();
                        model[range].fill(0);
                    }
                }
            }
        });
        prop_assert!(arriving.is_complete() && arriving.missing_blocks() == 0);
        bench.disk.keep().unwrap();
        prop_assert!(fs::read(&bench.path).unwrap() == model);
        // The guest's changes, and not what arrived.
        let bitmap = bench.disk.bitmaps().copy("b").unwrap();
        prop_assert!((0u64..).zip(&dirty).all(|(sector, dirty)| bitmap.extent(sector * 512, sector * 512 + 512).1 == *dirty));
        let state = arriving.state();
        prop_assert!(state.claimed.is_empty());
    }
}
