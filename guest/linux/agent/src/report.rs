//! The JSON lines on standard output, and the counters in them.

use std::fmt::{self, Display};
use std::fs;
use std::io::{self, Write};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicI64, AtomicU64};

use crate::clock;
use crate::options::Options;

/// Pages of memory written, since the start.
pub static PAGES_DIRTIED: AtomicU64 = AtomicU64::new(0);
/// Pages of memory read and compared, since the start.
pub static PAGES_CHECKED: AtomicU64 = AtomicU64::new(0);
/// Files written, synced and renamed, since the start.
pub static FILES_WRITTEN: AtomicU64 = AtomicU64::new(0);
/// Files read from the device and compared, since the start.
pub static FILES_CHECKED: AtomicU64 = AtomicU64::new(0);
/// Longest time between two looks at the clock since the last tick, in microseconds.
pub static TICK_GAP_US: AtomicU64 = AtomicU64::new(0);
/// Longest time between two looks at the clock since the start, in microseconds.
pub static MAX_GAP_US: AtomicU64 = AtomicU64::new(0);
static FAILURES: AtomicU64 = AtomicU64::new(0);
/// CLOCK_REALTIME minus CLOCK_MONOTONIC at the start, in nanoseconds.
static WALL_OFFSET: AtomicI64 = AtomicI64::new(0);

/// The counters at one moment.
#[derive(Default)]
pub struct Totals {
    failures: u64,
    pages_dirtied: u64,
    pages_checked: u64,
    files_written: u64,
    files_checked: u64,
    max_gap_us: u64,
}

impl Totals {
    /// Reads all the counters.
    pub fn now() -> Self {
        Totals {
            failures: FAILURES.load(Relaxed),
            pages_dirtied: PAGES_DIRTIED.load(Relaxed),
            pages_checked: PAGES_CHECKED.load(Relaxed),
            files_written: FILES_WRITTEN.load(Relaxed),
            files_checked: FILES_CHECKED.load(Relaxed),
            max_gap_us: MAX_GAP_US.load(Relaxed),
        }
    }
}

impl Display for Totals {
    /// As members of a JSON object, the clocks with them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (monotonic, wall) = (clock::monotonic(), clock::wall());
        write!(
            f,
            r#""failures":{},"mono_ms":{},"wall_ms":{},"wall_drift_us":{},"pages_dirtied":{},"pages_checked":{},"files_written":{},"files_checked":{},"max_gap_us":{}"#,
            self.failures,
            monotonic / 1_000_000,
            wall / 1_000_000,
            (wall - monotonic - WALL_OFFSET.load(Relaxed)) / 1000,
            self.pages_dirtied,
            self.pages_checked,
            self.files_written,
            self.files_checked,
            self.max_gap_us,
        )
    }
}

/// A string as JSON has it.
struct Quoted<'a>(&'a str);

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for c in self.0.chars() {
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                c if c.is_control() => write!(f, "\\u{:04x}", u32::from(c))?,
                c => write!(f, "{c}")?,
            }
        }
        f.write_str("\"")
    }
}

/// Prints a line with one `write`, so that no other line can come into its middle.
fn line(text: &str) {
    // A console that cannot be written to leaves nobody to tell.
    let _ = io::stdout().lock().write_all(format!("{text}\n").as_bytes());
}

fn first_line(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

/// What runs, on what.
pub fn start(options: &Options, power_button: bool) {
    WALL_OFFSET.store(clock::wall() - clock::monotonic(), Relaxed);
    line(&format!(
        r#"{{"agent":"start","kernel":{},"cpus":{},"clocksource":{},"memory_mib":{},"threads":{},"rate":{},"disk":{},"power_button":{power_button}}}"#,
        Quoted(&first_line("/proc/sys/kernel/osrelease")),
        std::thread::available_parallelism().map_or(1, usize::from),
        Quoted(&first_line(
            "/sys/devices/system/clocksource/clocksource0/current_clocksource"
        )),
        options.memory_mib,
        options.threads,
        options.rate,
        options
            .disk
            .as_deref()
            .map_or("null".to_owned(), |disk| Quoted(disk).to_string()),
    ));
}

/// The heartbeat.
pub fn tick(seq: u64, totals: &Totals) {
    line(&format!(
        r#"{{"agent":"tick","seq":{seq},"ok":{},{totals},"tick_gap_us":{}}}"#,
        totals.failures == 0,
        TICK_GAP_US.swap(0, Relaxed),
    ));
}

/// Something is not as it was written, in `part` (memory, disk, clock, options or agent).
pub fn failure(part: &str, detail: &str) {
    FAILURES.fetch_add(1, Relaxed);
    line(&format!(
        r#"{{"agent":"failure","part":"{part}","detail":{}}}"#,
        Quoted(detail)
    ));
}

/// The last line; gives whether all was well.
pub fn verdict(reason: &str, seq: u64, totals: &Totals) -> bool {
    let ok = FAILURES.load(Relaxed) == 0;
    line(&format!(
        r#"{{"agent":"verdict","ok":{ok},"reason":"{reason}","seq":{seq},{totals}}}"#
    ));
    ok
}
