//! The least that a postcopy of random accesses takes: no guest, no protocol, no account of what is missing, one thread for each thing that
//! somebody waits for.

use std::io::{IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ferry::memory::staging::StagingArea;
use ferry::memory::uffd::Userfaultfd;
use ferry::memory::{GuestRam, HUGE_PAGE, PAGE_SIZE, PageNumber, PageRun};
use ferry::migrate::driver::scheduling;
use ferry::migrate::transport::Wake;

/// As pagestorm: how often it wakes up for what is due, what it drops, and what it calls a slow write.
const WAKES: Duration = Duration::from_millis(1);
const BEHIND: Duration = Duration::from_millis(10);
const SLOW: Duration = Duration::from_micros(30);
/// What is written, to the first byte of a page: none that `source` has there.
const WRITTEN: u8 = 2;

/// What it came to.
pub struct Floor {
    pub seconds: f64,
    /// Writes, of those that were due.
    pub progress: f64,
    /// How long slow writes took.
    pub slow: Vec<Duration>,
}

fn read_u64(from: &mut TcpStream) -> Option<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes).ok().map(|()| u64::from_le_bytes(bytes))
}

/// Writes to random pages, so many a second, until it is to end.
fn write_randomly(ram: &GuestRam, rate: u64, over: &AtomicBool) -> (f64, Vec<Duration>) {
    let (began, interval) = (Instant::now(), Duration::from_secs(1) / rate as u32);
    let (mut due, mut written, mut slow, mut random) = (began, 0u64, Vec::new(), 1u64);
    while !over.load(Ordering::Relaxed) {
        while due <= Instant::now() {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let page = PageRun::single(PageNumber((random >> 33) % ram.pages()));
            let before = Instant::now();
            // SAFETY: mapped, and nothing holds references to it.
            unsafe { ram.host_address(page).unwrap().write_volatile(WRITTEN) };
            let took = before.elapsed();
            if took > SLOW {
                slow.push(took);
            }
            written += 1;
            due = (due + interval).max(before.checked_sub(BEHIND).unwrap());
        }
        thread::sleep(WAKES);
    }
    (written as f64 / (began.elapsed().as_secs_f64() * rate as f64), slow)
}

/// Moves `source` over `bulk` into memory that somebody writes to already, `rate` pages a second, and waits for over `urgent`. Each is the
/// source's end and the destination's.
pub fn run(source: &'static [u8], rate: u64, mut bulk: (TcpStream, TcpStream), urgent: (TcpStream, TcpStream)) -> Floor {
    let ram = GuestRam::allocate(source.len() as u64).unwrap();
    let area = StagingArea::new(&ram).unwrap();
    let pages = Userfaultfd::open().unwrap().register(ram.clone()).unwrap();
    let (over, stop) = (AtomicBool::new(false), Wake::new().unwrap());
    let ((mut asked, mut answers), (mut asks, mut answered)) =
        ((urgent.0.try_clone().unwrap(), urgent.0), (urgent.1.try_clone().unwrap(), urgent.1));
    let began = Instant::now();
    thread::scope(|scope| {
        scope.spawn(move || {
            scheduling::is_bulk();
            source.chunks(HUGE_PAGE as usize * PAGE_SIZE).for_each(|chunk| bulk.0.write_all(chunk).unwrap());
        });
        scope.spawn(move || {
            scheduling::is_prompt();
            while let Some(page) = read_u64(&mut asked) {
                let contents = &source[page as usize * PAGE_SIZE..][..PAGE_SIZE];
                let sent = answers.write_vectored(&[IoSlice::new(&page.to_le_bytes()), IoSlice::new(contents)]).unwrap();
                assert_eq!(sent, 8 + PAGE_SIZE, "a page always fits");
            }
        });
        scope.spawn(|| {
            scheduling::is_prompt();
            while let Some(fault) = pages.next_fault(&stop).unwrap() {
                asks.write_all(&fault.page.0.to_le_bytes()).unwrap();
            }
            asks.shutdown(std::net::Shutdown::Write).unwrap();
        });
        scope.spawn(|| {
            scheduling::is_prompt();
            let mut contents = [0; PAGE_SIZE];
            while let Some(page) = read_u64(&mut answered) {
                answered.read_exact(&mut contents).unwrap();
                pages.place(PageRun::single(PageNumber(page)), &contents).unwrap();
            }
        });
        let guest = scope.spawn(|| write_randomly(&ram, rate, &over));
        scheduling::is_bulk();
        for first in (0..ram.pages()).step_by(HUGE_PAGE as usize) {
            let run = PageRun::new(first, HUGE_PAGE);
            let place = area.ram().host_address(run).unwrap();
            // SAFETY: mapped, and nobody else looks at it before it is complete.
            bulk.1.read_exact(unsafe { std::slice::from_raw_parts_mut(place.as_ptr(), run.bytes() as usize) }).unwrap();
            pages.replace(run, &area).unwrap();
        }
        let seconds = began.elapsed().as_secs_f64();
        over.store(true, Ordering::Relaxed);
        let (progress, mut slow) = guest.join().unwrap();
        stop.wake();
        // A program that loses pages is no measure.
        for (page, contents) in source.chunks(PAGE_SIZE).enumerate() {
            // SAFETY: mapped, and nobody writes to it any more.
            let first = unsafe { ram.host_address(PageRun::single(PageNumber(page as u64))).unwrap().read_volatile() };
            assert!(first == contents[0] || first == WRITTEN, "page {page} has been lost");
        }
        slow.sort();
        Floor { seconds, progress, slow }
    })
}
