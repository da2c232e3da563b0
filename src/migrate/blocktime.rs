//! How long the guest waits for pages that come after it: QEMU's postcopy blocktime.
//!
//! A thread is blocked from its page fault until the page is placed. Which vCPU it runs is known by its id. Where KVM makes page faults
//! asynchronous, as it may for a guest that has interrupts enabled, the vCPU is halted and a worker of the kernel takes the fault; its id
//! names no vCPU, so that the wait counts as another thread's, as in QEMU.

use std::collections::HashMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use rustix::process::Pid;

use super::report::Faults;
use crate::memory::{PageNumber, PageRun};

/// Buckets of [`Faults::latency_dist`], as many as QEMU has.
const BUCKETS: u32 = 24;

/// Waits that have ended, and those that go on.
#[derive(Clone, Debug)]
pub struct Blocktime {
    latencies: Latencies,
    latency: Waits,
    waiting: HashMap<Pid, Waiting>,
    /// The vCPUs by number.
    vcpus: Vec<Vcpu>,
    others: Waits,
    /// Since when all vCPUs wait.
    all_since: Option<Duration>,
    all: Duration,
}

/// How long waits took.
#[derive(Clone, Debug)]
pub struct Latencies(Option<Histogram<u64>>);

impl Default for Latencies {
    fn default() -> Self {
        // One microsecond to ten minutes, two digits.
        Latencies(Histogram::new_with_bounds(1, 600_000_000, 2).ok())
    }
}

impl Latencies {
    /// Counts a wait.
    pub fn record(&mut self, latency: Duration) {
        if let Some(latencies) = &mut self.0 {
            latencies.saturating_record(latency.as_micros() as u64);
        }
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.0.as_ref().map_or(0, Histogram::len)
    }

    /// Median, 99th percentile and longest, in microseconds.
    pub fn percentiles(&self) -> [u64; 3] {
        let latencies = self.0.as_ref();
        latencies.map_or([0; 3], |latencies| [latencies.value_at_quantile(0.5), latencies.value_at_quantile(0.99), latencies.max()])
    }
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    page: PageNumber,
    since: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Vcpu {
    thread: Pid,
    waits: Waits,
}

#[derive(Clone, Copy, Debug, Default)]
struct Waits {
    total: Duration,
    count: u32,
}

impl Waits {
    fn add(&mut self, time: Duration) {
        self.total += time;
        self.count = self.count.saturating_add(1);
    }

    fn average_ns(self) -> u64 {
        self.total.checked_div(self.count).map_or(0, |average| average.as_nanos() as u64)
    }
}

impl Default for Blocktime {
    fn default() -> Self {
        Blocktime {
            latencies: Latencies::default(),
            latency: Waits::default(),
            waiting: HashMap::new(),
            vcpus: Vec::new(),
            others: Waits::default(),
            all_since: None,
            all: Duration::ZERO,
        }
    }
}

impl Blocktime {
    /// The threads of the vCPUs, that of vCPU 0 first. Before any of them runs the guest.
    pub fn set_vcpus(&mut self, threads: &[Pid]) {
        self.vcpus = threads.iter().map(|thread| Vcpu { thread: *thread, waits: Waits::default() }).collect();
    }

    /// `thread` waits for `page` from `now` on.
    pub fn begin(&mut self, thread: Pid, page: PageNumber, now: Duration) {
        match self.waiting.get(&thread) {
            // Woken too early.
            Some(waiting) if waiting.page == page => return,
            // It goes on, so its page is there; who placed it has not said so yet.
            Some(_) => self.end(thread, now),
            None => {}
        }
        self.waiting.insert(thread, Waiting { page, since: now });
        if self.all_wait() {
            self.all_since = Some(now);
        }
    }

    /// The pages of `run` have been placed, and the first touch of each that was waited for was answered after one of `latencies`.
    pub fn placed(&mut self, run: PageRun, latencies: &[Duration], now: Duration) {
        for latency in latencies {
            self.latency.add(*latency);
            self.latencies.record(*latency);
        }
        let is_placed = |waiting: &Waiting| (run.first.0..run.end()).contains(&waiting.page.0);
        let woken: Vec<_> = self.waiting.iter().filter(|(_, waiting)| is_placed(waiting)).map(|(thread, _)| *thread).collect();
        woken.into_iter().for_each(|thread| self.end(thread, now));
    }

    fn end(&mut self, thread: Pid, now: Duration) {
        if let Some(since) = self.all_since.filter(|_| self.vcpus.iter().any(|vcpu| vcpu.thread == thread)) {
            self.all += now.saturating_sub(since);
            self.all_since = None;
        }
        let Some(waiting) = self.waiting.remove(&thread) else { return };
        let waits = self.vcpus.iter_mut().find(|vcpu| vcpu.thread == thread).map_or(&mut self.others, |vcpu| &mut vcpu.waits);
        waits.add(now.saturating_sub(waiting.since));
    }

    fn all_wait(&self) -> bool {
        self.all_since.is_none() && !self.vcpus.is_empty() && self.vcpus.iter().all(|vcpu| self.waiting.contains_key(&vcpu.thread))
    }

    /// Writes all waits that have ended into `faults`.
    pub fn write(&self, faults: &mut Faults) {
        [faults.p50_us, faults.p99_us, faults.max_us] = self.latencies.percentiles();
        if let Some(latencies) = &self.latencies.0 {
            // The histogram's own buckets end at powers of two, so these counts are exact.
            let bucket = |index| match index {
                0 => latencies.count_between(0, 1),
                _ if index == BUCKETS - 1 => latencies.count_between(1 << index, u64::MAX),
                _ => latencies.count_between(1 << index, (2 << index) - 1),
            };
            faults.latency_dist = (0..BUCKETS).map(bucket).collect();
        }
        let microseconds = |time: Duration| time.as_micros() as u64;
        faults.latency_ns = self.latency.average_ns();
        faults.blocktime_us = microseconds(self.all);
        faults.vcpu_blocktime_us = self.vcpus.iter().map(|vcpu| microseconds(vcpu.waits.total)).collect();
        faults.vcpu_latency_ns = self.vcpus.iter().map(|vcpu| vcpu.waits.average_ns()).collect();
        faults.non_vcpu_latency_ns = self.others.average_ns();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    fn thread(id: i32) -> Pid {
        Pid::from_raw(id).unwrap()
    }

    #[test]
    fn time_is_counted_by_vcpu_and_where_all_wait() {
        let mut blocktime = Blocktime::default();
        blocktime.set_vcpus(&[thread(11), thread(12)]);
        blocktime.begin(thread(11), PageNumber(5), us(100));
        blocktime.begin(thread(99), PageNumber(6), us(110));
        blocktime.begin(thread(12), PageNumber(5), us(150));
        blocktime.begin(thread(12), PageNumber(5), us(160));
        blocktime.placed(PageRun::new(5, 1), &[us(200)], us(300));
        blocktime.placed(PageRun::new(5, 9), &[us(400)], us(510));
        // Its second fault tells that the first one is over.
        blocktime.begin(thread(12), PageNumber(20), us(1000));
        blocktime.begin(thread(12), PageNumber(21), us(1020));
        blocktime.placed(PageRun::new(21, 1), &[], us(1030));
        let mut faults = Faults::default();
        blocktime.write(&mut faults);
        assert_eq!(faults.vcpu_blocktime_us, [200, 180]);
        assert_eq!(faults.blocktime_us, 150, "both waited from 150 on until 300");
        assert_eq!(faults.vcpu_latency_ns, [200_000, 60_000]);
        assert_eq!((faults.latency_ns, faults.non_vcpu_latency_ns), (300_000, 400_000));
    }

    #[test]
    fn latencies_are_counted_in_powers_of_two() {
        let mut blocktime = Blocktime::default();
        let latencies = [0, 1, 2, 3, 4, 255, 256, 511, 512, 8_388_607, 8_388_608, 300_000_000, u64::MAX / 2].map(us);
        blocktime.placed(PageRun::new(0, 1), &latencies, us(0));
        let mut faults = Faults::default();
        blocktime.write(&mut faults);
        let counts: Vec<_> =
            (0..).zip(&faults.latency_dist).filter(|(_, count)| **count > 0).map(|(index, count)| (index, *count)).collect();
        assert_eq!(faults.latency_dist.len(), 24);
        assert_eq!(counts, [(0, 2), (1, 2), (2, 1), (7, 1), (8, 2), (9, 1), (22, 1), (23, 3)]);
    }
}
