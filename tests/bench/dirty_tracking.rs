//! What the dirty log and the dirty ring cost on this host, for the rule by which `--dirty-tracking auto` chooses: pagestorm runs on two
//! vCPUs and its dirty pages are harvested and cleared ten times a second. `cargo bench --bench dirty_tracking [-- MiB...]`, with
//! guest/pagestorm built before.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ferry::memory::dirty_tracker::TrackerChoice;
use ferry::memory::{GuestRam, PageRun, PageSet};
use ferry::vm::config::GuestConfig;
use ferry::vm::{Running, Vm};

const ROUNDS: u32 = 40;
const INTERVAL: Duration = Duration::from_millis(100);
/// Pages that a migration clears at once.
const CHUNK: u64 = 4096;

#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Console {
    /// Waits until the guest has said `what`.
    fn wait_for(&self, what: &str) {
        while !String::from_utf8_lossy(&self.0.lock().unwrap()).contains(what) {
            std::thread::sleep(INTERVAL);
        }
    }

    /// Pages written by each vCPU, as it said last, and the number of the second.
    fn written(&self) -> (u64, u64) {
        let text = String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned();
        let last = |cpu: u32| {
            let start = format!("stat cpu={cpu} ");
            let line = text.lines().rev().skip(1).find(|line| line.starts_with(&start)).unwrap_or_default();
            let value = |key: &str| line.split(' ').find_map(|word| word.strip_prefix(key)).map_or(0, |value| value.parse().unwrap());
            (value("writes="), value("seq="))
        };
        let ((first, seconds), (second, _)) = (last(0), last(1));
        (first + second, seconds)
    }
}

fn boot(mebibytes: u64, rate: &str, tracker: TrackerChoice) -> (Vm<Running>, Console) {
    let kernel = concat!(env!("CARGO_MANIFEST_DIR"), "/guest/pagestorm/target/release/pagestorm");
    let config = GuestConfig {
        name: "bench".into(),
        cpus: 2,
        memory: mebibytes << 20,
        lock_memory: false,
        hugepages: false,
        kernel: kernel.into(),
        initrd: None,
        cmdline: format!("cpus=2 fill=all rate={rate} order=random verify=0 heartbeat=0"),
        disks: Vec::new(),
    };
    let ram = GuestRam::allocate(config.memory).unwrap();
    let mut vm = Vm::build(&config, ram, tracker, crossbeam_channel::unbounded().0).unwrap();
    let console = Console::default();
    vm.serial().set_output(Box::new(console.clone()));
    vm.load_kernel().unwrap();
    let vm = vm.start().unwrap_or_else(|error| panic!("{error:?}"));
    console.wait_for("stat cpu=1 seq=1");
    (vm, console)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn main() {
    let sizes: Vec<u64> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![128, 1024, 4096] } else { sizes };
    println!("   MiB     rate tracker  start ms  harvest us  clear ms  pages/harvest  us/page  written/s (untracked)");
    for mebibytes in sizes {
        for rate in ["0", "1000", "max"] {
            for (name, choice) in [("log", TrackerChoice::Log), ("ring", TrackerChoice::Ring)] {
                let (vm, console) = boot(mebibytes, rate, choice);
                let pages = vm.ram().pages();
                let before = console.written();
                std::thread::sleep(Duration::from_secs(2));
                let free = console.written();
                let begin = Instant::now();
                let mut owed = PageSet::empty(pages);
                let mut tracker = vm.tracking().start(vm.ram(), &mut owed).unwrap();
                let start = begin.elapsed();
                let (mut harvests, mut clears, mut found) = (Vec::new(), Vec::new(), 0);
                let mut tracked = console.written();
                for round in 0..ROUNDS {
                    let begin = Instant::now();
                    for range in (0..pages).step_by(CHUNK as usize).map(|first| PageRun::new(first, CHUNK.min(pages - first))) {
                        if owed.runs_within(range).next().is_some() {
                            tracker.clear(&owed, range).unwrap();
                        }
                    }
                    clears.push(begin.elapsed());
                    std::thread::sleep(INTERVAL);
                    owed = PageSet::empty(pages);
                    let begin = Instant::now();
                    found += tracker.harvest(&mut owed).unwrap();
                    harvests.push(begin.elapsed());
                    if round == ROUNDS / 4 {
                        // The first pass is over: that of clearing what the guest had written before.
                        (tracked, found) = (console.written(), 0);
                        harvests.clear();
                        clears.clear();
                    }
                }
                let end = console.written();
                let rounds = harvests.len() as u64;
                let cost: Duration = harvests.iter().chain(&clears).sum();
                let speed = |from: (u64, u64), to: (u64, u64)| (to.0 - from.0) / (to.1 - from.1).max(1);
                println!(
                    "{mebibytes:>6} {rate:>8} {name:>7} {:>9.2} {:>11.1} {:>9.2} {:>14} {:>8.2} {:>10} ({})",
                    start.as_secs_f64() * 1e3,
                    median(&mut harvests).as_secs_f64() * 1e6,
                    median(&mut clears).as_secs_f64() * 1e3,
                    found / rounds,
                    cost.as_secs_f64() * 1e6 / found.max(1) as f64,
                    speed(tracked, end),
                    speed(before, free),
                );
                tracker.stop().unwrap();
            }
        }
    }
}
