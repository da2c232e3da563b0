//! The Linux guest's workload and self-check.
//!
//! It keeps memory, a disk and the clocks busy, checks every byte it reads back, and reports on
//! standard output in JSON lines, one object a line, told apart by their `agent` key: `start`,
//! `tick` (once a second), `failure` and, last, `verdict`. The kernel's command line sets what it
//! does; see [`options`]. It ends on the power button, on SIGTERM or after `agent.run` seconds, and
//! its exit status is 0 if the verdict is good.

mod clock;
mod disk;
mod memory;
mod options;
mod pattern;
mod report;
mod stop;

use std::process::ExitCode;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

use options::Options;
use report::Totals;

const TICK: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let options = match Options::parse(&command_line) {
        Ok(options) => options,
        Err(error) => {
            report::failure("options", &error);
            report::verdict("options", 0, &Totals::default());
            return ExitCode::FAILURE;
        }
    };

    // Before any thread starts, so that all of them leave SIGTERM to the one that waits for it.
    let (stop_requests, power_button) = stop::listen();
    report::start(&options, power_button);

    let mut workers = Vec::new();
    for slab in memory::slabs(options.memory_mib, options.threads, options.rate) {
        workers.push(thread::spawn(move || slab.run()));
    }
    if let Some(device) = options.disk.clone() {
        workers.push(thread::spawn(move || disk::run(&device)));
    }
    workers.push(thread::spawn(clock::run));

    let begin = Instant::now();
    let mut next_tick = begin + TICK;
    let mut seq = 0;
    let reason = loop {
        let wait = next_tick.saturating_duration_since(Instant::now());
        match stop_requests.recv_timeout(wait) {
            Ok(reason) => break reason,
            Err(RecvTimeoutError::Disconnected) => thread::sleep(wait),
            Err(RecvTimeoutError::Timeout) => {}
        }
        seq += 1;
        report::tick(seq, &Totals::now());
        let now = Instant::now();
        if options.run.is_some_and(|run| now - begin >= run) {
            break "run";
        }
        // A pause of the whole guest is one late tick, not a burst of them.
        next_tick = (next_tick + TICK).max(now);
    };

    // Every worker checks everything it owns a last time before it ends.
    stop::STOPPING.store(true, std::sync::atomic::Ordering::Relaxed);
    for worker in workers {
        if worker.join().is_err() {
            report::failure("agent", "a worker thread panicked");
        }
    }
    if report::verdict(reason, seq, &Totals::now()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
