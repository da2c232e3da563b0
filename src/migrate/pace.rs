//! Keeping to a bandwidth: how long to wait before sending. No clock and no sleeping in here.

use std::num::NonZeroU64;
use std::time::Duration;

/// How far a sender that was held up may make up for it. Short, so that an urgent page never waits out a long burst of background
/// pages in the network's buffers; longer than a thread's wake-up takes.
const BURST: Duration = Duration::from_millis(2);

/// A token bucket, kept as the time at which all that was sent so far is paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// In bytes a second; `None` is no limit.
    rate: Option<NonZeroU64>,
    paid: Duration,
}

impl Pace {
    /// A pace of `bytes_per_second`, or without a limit.
    pub const fn new(bytes_per_second: Option<NonZeroU64>) -> Self {
        Pace { rate: bytes_per_second, paid: Duration::ZERO }
    }

    /// The limit, in bytes a second.
    pub const fn rate(&self) -> Option<NonZeroU64> {
        self.rate
    }

    /// Counts `bytes` as sent and returns how long to wait before sending them. `now` is the time since any fixed moment. Who sends
    /// without waiting (an urgent page) makes those who wait, wait longer.
    pub fn delay(&mut self, now: Duration, bytes: u64) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let begin = self.paid.max(now.saturating_sub(BURST));
        self.paid = begin.saturating_add(time_for(bytes, rate));
        begin.saturating_sub(now)
    }

    /// Of what was counted `bytes` were not sent after all.
    pub fn refund(&mut self, bytes: u64) {
        if let Some(rate) = self.rate {
            self.paid = self.paid.saturating_sub(time_for(bytes, rate));
        }
    }

    /// Changes the limit. What is owed stays owed, in bytes; without a limit it is forgiven.
    pub fn set_rate(&mut self, now: Duration, bytes_per_second: Option<NonZeroU64>) {
        self.paid = match (self.rate, bytes_per_second) {
            (Some(old), Some(new)) => {
                let owed = self.paid.saturating_sub(now).as_nanos().saturating_mul(u128::from(old.get())) / u128::from(new.get());
                now.saturating_add(nanoseconds(owed))
            }
            _ => now,
        };
        self.rate = bytes_per_second;
    }
}

/// How long `bytes` take at `rate` bytes a second.
fn time_for(bytes: u64, rate: NonZeroU64) -> Duration {
    nanoseconds(u128::from(bytes) * 1_000_000_000 / u128::from(rate.get()))
}

fn nanoseconds(count: u128) -> Duration {
    Duration::from_nanos(u64::try_from(count).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
