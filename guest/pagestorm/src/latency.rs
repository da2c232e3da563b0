//! Counts of durations in logarithmic classes, written by one vCPU and read by another.

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Classes in an octave.
const PER_OCTAVE: u64 = 8;
/// Up to 2^22 microseconds, four seconds; the last class has all that is longer.
const CLASSES: usize = 20 * PER_OCTAVE as usize;

/// How many durations there were of each class.
#[derive(Debug)]
pub struct Latencies([AtomicU32; CLASSES]);

/// The class of a duration in microseconds.
fn class(us: u64) -> usize {
    if us < PER_OCTAVE {
        return us as usize;
    }
    let octave = us.ilog2() - PER_OCTAVE.ilog2();
    let class = u64::from(octave) * PER_OCTAVE + (us >> octave);
    (class as usize).min(CLASSES - 1)
}

/// The shortest duration of a class, in microseconds.
pub fn lowest(class: usize) -> u64 {
    let class = class as u64;
    if class < 2 * PER_OCTAVE {
        return class;
    }
    let octave = class / PER_OCTAVE - 1;
    (class % PER_OCTAVE + PER_OCTAVE) << octave
}

impl Latencies {
    /// None yet.
    pub const fn new() -> Self {
        Latencies([const { AtomicU32::new(0) }; CLASSES])
    }

    /// Counts a duration of so many microseconds.
    pub fn add(&self, us: u64) {
        if let Some(count) = self.0.get(class(us)) {
            count.fetch_add(1, Relaxed);
        }
    }

    /// Classes that are not empty and their counts.
    pub fn counts(&self) -> impl Iterator<Item = (usize, u32)> {
        let counts = self.0.iter().map(|count| count.load(Relaxed));
        counts.enumerate().filter(|(_, count)| *count > 0)
    }
}

impl Default for Latencies {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_at_most_an_eighth_wide() {
        for us in (0..5000).chain([99_999, 1_000_000, 4_000_000]) {
            let low = lowest(class(us));
            assert!(
                low <= us && us - low <= us / PER_OCTAVE,
                "{us} is in the class of {low}"
            );
            assert_eq!(class(low), class(us));
        }
        assert_eq!(class(u64::MAX), CLASSES - 1);
    }

    #[test]
    fn classes_without_durations_are_left_out() {
        let latencies = Latencies::new();
        for us in [40, 1000, 41, 40] {
            latencies.add(us);
        }
        let counts: Vec<_> = latencies
            .counts()
            .map(|(class, count)| (lowest(class), count))
            .collect();
        assert_eq!(counts, [(40, 3), (960, 1)]);
    }
}
