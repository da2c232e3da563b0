//! What the boot vCPU prints while the workload runs.

use core::sync::atomic::Ordering::*;

use pagestorm::cmdline::Heartbeat;
use pagestorm::cpu_record::CpuRecord;
use pagestorm::latency;

use super::console::{self, line};
use super::world::{RECORDS, World};

/// Heartbeats, counters and verdicts.
pub struct Reporter {
    world: &'static World,
    /// Cycles between heartbeats.
    period: Option<u64>,
    next_heartbeat: u64,
    heartbeats: u64,
    /// Never, with `stat=off`.
    next_stat: u64,
    stats: u64,
    passes: u64,
    /// By heartbeats.
    writes_told: u64,
}

impl Reporter {
    /// The first heartbeat is due at `now`, the first counters a second later if there are any.
    pub fn new(world: &'static World, now: u64) -> Self {
        let period = world.config.heartbeat * world.tsc_hz / 1000;
        Reporter {
            world,
            period: (period > 0).then_some(period),
            next_heartbeat: now,
            heartbeats: 0,
            next_stat: if world.config.stat {
                now + world.tsc_hz
            } else {
                u64::MAX
            },
            stats: 0,
            passes: 0,
            writes_told: 0,
        }
    }

    /// When something is to be printed next.
    pub fn next(&self) -> u64 {
        match self.period {
            Some(_) => self.next_heartbeat.min(self.next_stat),
            None => self.next_stat,
        }
    }

    /// Prints what is due at `now`.
    pub fn print_due(&mut self, now: u64) {
        if let Some(period) = self.period
            && now >= self.next_heartbeat
        {
            match self.world.config.heartbeat_byte {
                Heartbeat::Line => line!("hb seq={} tsc={now}", self.heartbeats),
                Heartbeat::Byte => console::byte(b'.'),
                Heartbeat::Writes => {
                    let (byte, told) = Heartbeat::writes_byte(self.writes() - self.writes_told);
                    self.writes_told += told;
                    console::byte(byte);
                }
            }
            self.heartbeats += 1;
            // Beats that were missed are not made up for.
            self.next_heartbeat = (self.next_heartbeat + period).max(now.saturating_sub(period));
        }
        if now >= self.next_stat {
            self.next_stat = now + self.world.tsc_hz;
            self.print_stat();
            let passes = self.finished_passes();
            if passes > self.passes {
                self.passes = passes;
                line!("verdict ok passes={passes}");
            }
        }
    }

    fn writes(&self) -> u64 {
        self.records()
            .map(|(_, record)| record.writes.load(Relaxed))
            .sum()
    }

    /// Passes over all of RAM: the least that any vCPU has made.
    pub fn finished_passes(&self) -> u64 {
        let busy = self
            .records()
            .filter(|(_, record)| record.pages.load(Relaxed) > 0);
        busy.map(|(_, record)| record.passes.load(Relaxed))
            .min()
            .unwrap_or(0)
    }

    /// Prints every vCPU's counters.
    pub fn print_stat(&mut self) {
        self.end_heartbeats();
        for (cpu, record) in self.records() {
            line!(
                "stat cpu={cpu} seq={} writes={} reads={} passes={} disk_writes={} disk_reads={}",
                self.stats,
                record.writes.load(Relaxed),
                record.reads.load(Relaxed),
                record.passes.load(Relaxed),
                record.disk_writes.load(Relaxed),
                record.disk_reads.load(Relaxed),
            );
        }
        self.stats += 1;
    }

    /// Prints how many writes of every vCPU were slow, and how slow: once, because it takes so long that it would show in heartbeats.
    pub fn print_slow(&self) {
        if self.world.config.slow == 0 {
            return;
        }
        self.end_heartbeats();
        for (cpu, record) in self.records() {
            console::text(format_args!("slow cpu={cpu} us="));
            for (class, count) in record.slow.counts() {
                console::text(format_args!("{}:{count},", latency::lowest(class)));
            }
            console::end_line();
        }
    }

    fn records(&self) -> impl Iterator<Item = (usize, &'static CpuRecord)> {
        RECORDS.iter().take(self.world.cpus as usize).enumerate()
    }

    /// Heartbeats that are bytes are on a line of their own.
    fn end_heartbeats(&self) {
        if self.world.config.heartbeat_byte != Heartbeat::Line {
            console::end_line();
        }
    }
}
