use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::PageSet;
use crate::memory::hugetlb::provision::Provision;
use crate::memory::populated::populated;
use crate::memory::ram::GRANULE;
use crate::migrate::transport::{Connection, Interrupt, Listener, connect};

fn ram(granules: u64) -> PageIo {
    PageIo::new(GuestRam::allocate(granules * GRANULE).unwrap())
}

fn fill(io: &PageIo, run: PageRun, byte: u8) {
    io.ram.memory().write_slice(&vec![byte; run.bytes() as usize], GuestAddress(run.first.offset())).unwrap();
}

fn pair() -> (Connection, Connection) {
    let interrupt = Interrupt::new().unwrap();
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let client = connect(listener.address(), &interrupt, None).unwrap();
    (client, listener.accept(&interrupt, None).unwrap())
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(20))
}

#[test]
fn one_byte_anywhere_is_not_zero() {
    let io = ram(1);
    assert!(io.is_zero(PageNumber(0)).unwrap());
    for offset in 0..PAGE_SIZE as u64 {
        io.ram.memory().write_obj(1u8, GuestAddress(PAGE_SIZE as u64 + offset)).unwrap();
        assert!(!io.is_zero(PageNumber(1)).unwrap(), "{offset}");
        io.ram.memory().write_obj(0u8, GuestAddress(PAGE_SIZE as u64 + offset)).unwrap();
    }
    assert!(io.is_zero(PageNumber(1)).unwrap());
}

#[test]
fn runs_split_into_spans() {
    let io = ram(1);
    fill(&io, PageRun::new(2, 3), 7);
    fill(&io, PageRun::new(9, 1), 7);
    let split = |run, max| {
        io.split_zero(run, max, HostPage::SMALL)
            .map(|span| span.map(|s| (s.run.first.0, s.run.count, s.is_zero)).unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(split(PageRun::new(0, 10), 100), [(0, 2, true), (2, 3, false), (5, 4, true), (9, 1, false)]);
    assert_eq!(split(PageRun::new(3, 4), 1), [(3, 1, false), (4, 1, false), (5, 1, true), (6, 1, true)]);
    assert_eq!(split(PageRun::new(0, 0), 1), []);
    let beyond: Vec<_> = io.split_zero(PageRun::new(io.ram.pages() - 1, 3), 10, HostPage::SMALL).collect();
    assert!(matches!(beyond[..], [Err(PageIoError::Beyond(_))]), "{beyond:?}");
}

#[test]
fn units_are_zero_whole_or_not_at_all() {
    let io = ram(1);
    fill(&io, PageRun::new(9, 1), 7);
    let unit = HostPage::new(8).unwrap();
    let split = |run, max| {
        io.split_zero(run, max, unit).map(|span| span.map(|s| (s.run.first.0, s.run.count, s.is_zero)).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(split(PageRun::new(0, 32), 512), [(0, 8, true), (8, 8, false), (16, 16, true)]);
    assert_eq!(split(PageRun::new(16, 24), 16), [(16, 16, true), (32, 8, true)]);
}

#[test]
fn emptied_pages_of_hugetlb_memory_are_zero() {
    let _provision = Provision::new(2);
    let io = PageIo::new(GuestRam::allocate_hugetlb(2 * GRANULE).unwrap());
    fill(&io, PageRun::new(0, 1024), 7);
    io.discard(PageRun::new(3, 2)).unwrap();
    io.discard(PageRun::new(512, 512)).unwrap();
    let mut there = PageSet::empty(1024);
    populated(&io.ram, &mut there);
    assert_eq!(there.runs().collect::<Vec<_>>(), [PageRun::new(0, 512)], "a whole huge page is given back");
    let split: Vec<_> = io.split_zero(PageRun::new(0, 1024), 1024, HostPage::SMALL).map(|span| span.unwrap().run.count).collect();
    assert_eq!(split, [3, 2, 507, 512]);
}

#[test]
fn pages_travel_between_guests() {
    let (source, destination) = (ram(1), ram(1));
    let (first, second) = (PageRun::new(3, 40), PageRun::new(511, 1));
    fill(&source, first, 3);
    fill(&source, second, 4);
    let (here, there) = pair();
    let (_reader, mut writer) = here.split();
    let (mut reader, _writer) = there.split();
    thread::scope(|scope| {
        scope.spawn(|| {
            let pieces = [Piece::Bytes(b"one"), Piece::Pages(first), Piece::Bytes(b""), Piece::Pages(second), Piece::Bytes(b"end")];
            source.send(&pieces, &mut writer, soon()).unwrap();
        });
        let mut header = [0; 3];
        reader.read_exact(&mut header, soon()).unwrap();
        assert_eq!(&header, b"one");
        destination.receive(first, &mut reader, soon()).unwrap();
        destination.receive(second, &mut reader, soon()).unwrap();
        reader.read_exact(&mut header, soon()).unwrap();
        assert_eq!(&header, b"end");
    });
    for page in 0..source.ram.pages() {
        let [mut here, mut there] = [Vec::new(), Vec::new()];
        source.copy(PageRun::new(page, 1), &mut here).unwrap();
        destination.copy(PageRun::new(page, 1), &mut there).unwrap();
        assert!(here == there && here.len() == PAGE_SIZE, "page {page}");
    }
}

#[test]
fn runs_from_the_wire_are_checked() {
    let io = ram(1);
    let (here, _there) = pair();
    let (mut reader, mut writer) = here.split();
    for run in [PageRun::new(io.ram.pages(), 1), PageRun::new(1, u64::MAX), PageRun::new(0, 0)] {
        assert!(matches!(io.receive(run, &mut reader, soon()), Err(PageIoError::Beyond(_))), "{run}");
        assert!(matches!(io.send(&[Piece::Pages(run)], &mut writer, soon()), Err(PageIoError::Beyond(_))), "{run}");
    }
    assert!(matches!(io.is_zero(PageNumber(u64::MAX)), Err(PageIoError::Beyond(_))));
    let beyond = PageRun::new(io.ram.pages(), 1);
    assert!(matches!(io.copy(beyond, &mut Vec::new()), Err(PageIoError::Beyond(_))));
    assert!(matches!(io.write(beyond, &[0; PAGE_SIZE]), Err(PageIoError::Beyond(_))));
    assert!(matches!(io.write(PageRun::new(0, 1), &[0; 10]), Err(PageIoError::Beyond(_))));
}
