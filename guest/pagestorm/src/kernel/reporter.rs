//! What the boot vCPU prints while the workload runs.

use core::sync::atomic::Ordering::*;

use super::console::{self, line};
use super::world::{RECORDS, World};

/// Heartbeats, counters and verdicts.
pub struct Reporter {
    world: &'static World,
    /// Cycles between heartbeats.
    period: Option<u64>,
    next_heartbeat: u64,
    heartbeats: u64,
    next_stat: u64,
    stats: u64,
    passes: u64,
}

impl Reporter {
    /// The first heartbeat is due at `now`, the first counters a second later.
    pub fn new(world: &'static World, now: u64) -> Self {
        let period = world.config.heartbeat * world.tsc_hz / 1000;
        Reporter {
            world,
            period: (period > 0).then_some(period),
            next_heartbeat: now,
            heartbeats: 0,
            next_stat: now + world.tsc_hz,
            stats: 0,
            passes: 0,
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
            if self.world.config.heartbeat_byte {
                console::byte(b'.');
            } else {
                line!("hb seq={} tsc={now}", self.heartbeats);
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

    /// Passes over all of RAM: the least that any vCPU has made.
    pub fn finished_passes(&self) -> u64 {
        let busy = RECORDS
            .iter()
            .take(self.world.cpus as usize)
            .filter(|record| record.pages.load(Relaxed) > 0);
        busy.map(|record| record.passes.load(Relaxed))
            .min()
            .unwrap_or(0)
    }

    /// Prints every vCPU's counters.
    pub fn print_stat(&mut self) {
        for (cpu, record) in RECORDS.iter().take(self.world.cpus as usize).enumerate() {
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
}
