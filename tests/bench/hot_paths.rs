//! What the migration's hot paths cost, by themselves: `cargo bench --bench hot_paths`. Takes KVM and userfaultfd.
#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ferry::memory::dirty_tracker::TrackerChoice;
use ferry::memory::staging::StagingArea;
use ferry::memory::uffd::{MissingPages, Userfaultfd};
use ferry::memory::{GuestRam, HostPage, PAGE_SIZE, PageNumber, PageRun, PageSet};
use ferry::migrate::driver::page_io::PageIo;
use ferry::migrate::incoming::Incoming;
use ferry::migrate::layout::Layout;
use ferry::migrate::outgoing::Outgoing;
use ferry::migrate::transport::Wake;
use ferry::migrate::wire::{Frame, HEADER_SIZE, Header, MAX_RUN};
use ferry::vm::config::GuestConfig;
use ferry::vm::empty::EmptyVm;

/// Pages of 1 GiB.
const GIB: u64 = 1 << 18;

/// Every `step`th page of `universe`.
fn every(universe: u64, step: usize) -> PageSet {
    let mut set = PageSet::empty(universe);
    (0..universe).step_by(step).for_each(|page| {
        set.insert(PageRun::new(page, 1));
    });
    set
}

fn ram(pages: u64) -> GuestRam {
    GuestRam::allocate(pages * PAGE_SIZE as u64).unwrap()
}

/// Writes `byte` to every page of `ram`.
fn fill(ram: &GuestRam, byte: u8) {
    for page in 0..ram.pages() {
        PageIo::new(ram.clone()).write(PageRun::new(page, 1), &[byte; PAGE_SIZE]).unwrap();
    }
}

/// Finding what is dirty, in bitmaps of many words of which few are set.
fn scan(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scan");
    for (name, universe) in [("1 GiB", GIB), ("12 GiB", 12 * GIB)] {
        let few = every(universe, universe as usize / 256);
        group.bench_function(format!("256 pages of {name}"), |bencher| {
            bencher.iter(|| black_box(&few).runs().map(|run| run.count).sum::<u64>())
        });
    }
    group.finish();
}

fn config(pages: u64) -> GuestConfig {
    GuestConfig {
        name: "bench".into(),
        cpus: 1,
        memory: pages * PAGE_SIZE as u64,
        lock_memory: false,
        hugepages: false,
        kernel: "none".into(),
        initrd: None,
        cmdline: String::new(),
        disks: Vec::new(),
    }
}

/// One look at KVM's log of a machine in which nothing runs.
fn harvest(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("harvest");
    for (name, pages) in [("1 GiB", GIB), ("12 GiB", 12 * GIB)] {
        let ram = ram(pages);
        let vm = ferry::vm::Vm::build_in(
            EmptyVm::create().unwrap(),
            &config(pages),
            ram.clone(),
            TrackerChoice::Log,
            crossbeam_channel::unbounded().0,
        )
        .unwrap();
        let mut dirty = PageSet::empty(pages);
        let mut tracker = vm.tracking().start(&ram, &mut dirty).unwrap();
        group.bench_function(name, |bencher| bencher.iter(|| tracker.harvest(&mut dirty).unwrap()));
    }
    group.finish();
}

/// Telling pages of zeros from others, of 16 MiB: what a batch costs before it is sent.
fn zero_detection(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("zero detection");
    let pages = 4096;
    group.throughput(Throughput::Bytes(pages * PAGE_SIZE as u64));
    for (name, byte) in [("zeros", 0), ("others", 7)] {
        let ram = ram(pages);
        fill(&ram, byte);
        let io = PageIo::new(ram);
        let look = || io.split_zero(PageRun::new(0, pages), MAX_RUN, HostPage::SMALL).map(|span| span.unwrap().run.count).sum::<u64>();
        group.bench_function(name, |bencher| bencher.iter(look));
    }
    group.finish();
}

/// Headers and lists of zero pages.
fn framing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("framing");
    group.bench_function("header of a run", |bencher| bencher.iter(|| Header::pages(black_box(PageRun::new(12345, 512))).encode()));
    let zero = Frame::Zero((0..512).map(|page| PageRun::new(page * 7, 3)).collect());
    let bytes = zero.encode().unwrap();
    let (header, body) = bytes.split_first_chunk::<HEADER_SIZE>().unwrap();
    group.bench_function("512 runs of zero pages, to bytes", |bencher| bencher.iter(|| black_box(&zero).encode().unwrap()));
    group.bench_function("and back", |bencher| {
        bencher.iter(|| Frame::decode(Header::decode(black_box(*header)).unwrap(), black_box(body)).unwrap());
    });
    group.finish();
}

/// From a harvest to the batches that go out: a whole pass, with what is to be cleared.
fn run_building(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("run building");
    for (name, universe, step) in [("all of 1 GiB", GIB, 1), ("512 pages of 1 GiB", GIB, 512), ("512 pages of 12 GiB", 12 * GIB, 12 * 512)]
    {
        let dirty = every(universe, step);
        let idle = Outgoing::new(Layout::new(universe, HostPage::SMALL, &[]).unwrap());
        let pass = |mut outgoing: Outgoing| {
            outgoing.begin_pass(&dirty);
            let mut batches = 0;
            loop {
                black_box(outgoing.take_chunk_to_clear());
                match outgoing.take_next(MAX_RUN, 1) {
                    Some(runs) => batches += runs.len(),
                    None => return batches,
                }
            }
        };
        group.bench_function(name, |bencher| bencher.iter_batched(|| idle.clone(), pass, BatchSize::LargeInput));
    }
    group.finish();
}

fn missing(ram: &GuestRam) -> Arc<MissingPages> {
    Arc::new(Userfaultfd::open().unwrap().register(ram.clone()).unwrap())
}

/// Pages into guest RAM under userfaultfd.
fn placement(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("placement");
    let ram = ram(GIB / 4);
    let pages = missing(&ram);
    let all = PageRun::new(0, GIB / 4);
    for count in [1, 64, 512] {
        let contents = vec![7; count as usize * PAGE_SIZE];
        group.throughput(Throughput::Bytes(contents.len() as u64));
        // Each place is used once before all are emptied again, which does not count.
        let place = |iterations: u64| {
            let mut spent = Duration::ZERO;
            for iteration in 0..iterations {
                let slot = iteration % (all.count / count);
                if slot == 0 {
                    pages.discard(all).unwrap();
                }
                let begin = Instant::now();
                pages.place(PageRun::new(slot * count, count), &contents).unwrap();
                spent += begin.elapsed();
            }
            spent
        };
        group.bench_function(format!("{} KiB at once", count * 4), |bencher| bencher.iter_custom(place));
    }
    // From where they came together, a few pages of each being there already.
    let area = StagingArea::new(&ram).unwrap();
    let came = PageIo::new(area.ram().clone());
    let contents = vec![7; 512 * PAGE_SIZE];
    group.bench_function("a huge page", |bencher| {
        bencher.iter_custom(|iterations| {
            let mut spent = Duration::ZERO;
            for iteration in 0..iterations {
                let huge = PageRun::new(iteration % (all.count / 512) * 512, 512);
                pages.discard(huge).unwrap();
                pages.place(PageRun::new(huge.first.0 + 5, 8), &contents[..8 * PAGE_SIZE]).unwrap();
                came.write(huge, &contents).unwrap();
                let begin = Instant::now();
                pages.replace(huge, &area).unwrap();
                spent += begin.elapsed();
            }
            spent
        });
    });
    group.finish();
}

/// A thread touches a missing page, another one reads of it, asks the engine, places it: without a network what a fault costs.
fn fault_service(criterion: &mut Criterion) {
    let count = 4096;
    let ram = ram(count);
    let pages = missing(&ram);
    let stop = Arc::new(Wake::new().unwrap());
    let (its_pages, its_stop) = (pages.clone(), stop.clone());
    let service = std::thread::spawn(move || {
        let mut incoming = Incoming::new(PageSet::full(count), Layout::new(count, HostPage::SMALL, &[]).unwrap());
        let contents = [7; PAGE_SIZE];
        while let Some(fault) = its_pages.next_fault(&*its_stop).unwrap() {
            black_box(incoming.fault(fault.page, Duration::ZERO));
            its_pages.place(PageRun::single(fault.page), &contents).unwrap();
        }
    });
    let io = PageIo::new(ram);
    criterion.bench_function("fault service", |bencher| {
        bencher.iter_custom(|iterations| {
            let mut spent = Duration::ZERO;
            for iteration in 0..iterations {
                if iteration % count == 0 {
                    pages.discard(PageRun::new(0, count)).unwrap();
                }
                let begin = Instant::now();
                black_box(io.is_zero(PageNumber(iteration % count)).unwrap());
                spent += begin.elapsed();
            }
            spent
        });
    });
    stop.wake();
    service.join().unwrap();
}

criterion_group!(hot_paths, scan, harvest, zero_detection, framing, run_building, placement, fault_service);
criterion_main!(hot_paths);
