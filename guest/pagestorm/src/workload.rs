//! Which pages a vCPU owns, which it dirties next, and when.

use crate::cmdline::{Order, Rate};
use crate::page::mix;

/// The pages that vCPU `cpu` of `cpus` owns, of `pages` in all: first page and count. Shares are
/// disjoint, in order, and cover everything.
pub fn share(pages: u64, cpus: u32, cpu: u32) -> (u64, u64) {
    let (cpus, cpu) = (u128::from(cpus), u128::from(cpu));
    let first = (u128::from(pages) * cpu / cpus) as u64;
    let end = (u128::from(pages) * (cpu + 1) / cpus) as u64;
    (first, end - first)
}

/// A counter put through [`mix`]: cheap numbers without visible order.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Different seeds give different numbers.
    pub fn new(seed: u64) -> Self {
        Random(mix(seed ^ 0x5054_4d53))
    }

    /// A number below `limit`, 0 if that is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        ((u128::from(mix(self.0)) * u128::from(limit)) >> 64) as u64
    }
}

/// Picks indices below a count in a given order.
#[derive(Debug)]
pub struct Picker {
    order: Order,
    count: u64,
    next: u64,
    random: Random,
}

impl Picker {
    /// `count` is how many there are to pick from.
    pub fn new(order: Order, count: u64, seed: u64) -> Self {
        Picker {
            order,
            count,
            next: 0,
            random: Random::new(seed),
        }
    }

    /// The next index; below the count unless that is 0.
    pub fn pick(&mut self) -> u64 {
        match self.order {
            Order::Sequential => {
                let index = self.next;
                self.next = if index + 1 < self.count { index + 1 } else { 0 };
                index
            }
            Order::Random => self.random.below(self.count),
            Order::HotCold => {
                let hot = self.count.div_ceil(10);
                if hot == self.count || self.random.below(10) < 9 {
                    self.random.below(hot)
                } else {
                    hot + self.random.below(self.count - hot)
                }
            }
        }
    }
}

/// Says when something that is to happen at a rate is due. Time is in TSC cycles. What was
/// missed for more than a hundredth of a second is not made up for, so that a guest that stood still does
/// not start again with a burst.
#[derive(Debug)]
pub struct Pacer {
    /// None: never. Zero: always.
    interval: Option<u64>,
    backlog: u64,
    next: u64,
}

impl Pacer {
    /// Due for the first time at `start`; `hz` is the TSC's frequency.
    pub fn new(rate: Rate, hz: u64, start: u64) -> Self {
        let interval = match rate {
            Rate::Max => Some(0),
            Rate::PerSecond(0) => None,
            Rate::PerSecond(rate) => Some((hz / rate).max(1)),
        };
        Pacer {
            interval,
            backlog: hz / 100,
            next: start,
        }
    }

    /// Whether it is due at `now`; if so the next time is one interval later.
    pub fn due(&mut self, now: u64) -> bool {
        let Some(interval) = self.interval else {
            return false;
        };
        if now < self.next {
            return false;
        }
        self.next = self.next.max(now.saturating_sub(self.backlog)) + interval;
        true
    }

    /// When it is due next, if ever.
    pub fn next(&self) -> Option<u64> {
        self.interval.map(|_| self.next)
    }
}

#[cfg(test)]
mod tests;
