use super::*;

const MEGABYTE: u64 = 1_000_000;

fn rate(bytes_per_second: u64) -> Option<NonZeroU64> {
    NonZeroU64::new(bytes_per_second)
}

/// How long sending `count` times `bytes` takes a sender who waits as told, and is late by `late` each time.
fn run(pace: &mut Pace, start: Duration, count: u64, bytes: u64, late: Duration) -> Duration {
    let mut now = start;
    for _ in 0..count {
        let delay = pace.delay(now, bytes);
        now += delay;
        if delay > Duration::ZERO {
            now += late;
        }
    }
    now - start
}

#[test]
fn the_rate_is_met() {
    let mut pace = Pace::new(rate(125 * MEGABYTE));
    let took = run(&mut pace, Duration::from_secs(5), 1000, 125_000, Duration::ZERO);
    // Each of 1000 pieces takes 1 ms; the last is sent when the others are paid for, and the burst is free.
    assert_eq!(took, Duration::from_millis(999) - BURST);
}

#[test]
fn what_was_not_sent_costs_nothing() {
    let mut pace = Pace::new(rate(MEGABYTE));
    let now = Duration::from_secs(9);
    pace.delay(now, 2 * MEGABYTE);
    pace.refund(2 * MEGABYTE - 1000);
    assert_eq!(pace.delay(now + BURST, 0), Duration::ZERO);
    pace.delay(now + BURST, MEGABYTE);
    pace.refund(MEGABYTE / 2);
    assert_eq!(pace.delay(now + BURST, 0), Duration::from_millis(500) - BURST);
}

#[test]
fn being_late_costs_no_bandwidth() {
    let mut pace = Pace::new(rate(125 * MEGABYTE));
    let took = run(&mut pace, Duration::ZERO, 1000, 125_000, Duration::from_micros(70));
    assert!(took < Duration::from_millis(1000), "{took:?}");
}

#[test]
fn an_idle_sender_saves_up_no_more_than_a_burst() {
    let mut pace = Pace::new(rate(MEGABYTE));
    pace.delay(Duration::ZERO, 1000);
    let later = Duration::from_secs(100);
    let burst = BURST.as_millis() as u64 * 1000;
    assert_eq!(pace.delay(later, burst), Duration::ZERO);
    assert_eq!(pace.delay(later, 1000), Duration::ZERO);
    assert_eq!(pace.delay(later, 1000), Duration::from_millis(1));
}

#[test]
fn what_is_owed_stays_owed_at_another_rate() {
    let mut pace = Pace::new(rate(MEGABYTE));
    pace.delay(Duration::ZERO, MEGABYTE);
    pace.set_rate(Duration::ZERO, rate(10 * MEGABYTE));
    assert_eq!(pace.delay(Duration::ZERO, 1), Duration::from_millis(100));
    pace.set_rate(Duration::ZERO, None);
    assert_eq!(pace.delay(Duration::ZERO, u64::MAX), Duration::ZERO);
    pace.set_rate(Duration::ZERO, rate(1));
    assert_eq!(pace.delay(Duration::ZERO, 1), Duration::ZERO);
    assert_eq!(pace.delay(Duration::ZERO, 1), Duration::from_secs(1));
}

#[test]
fn extremes_do_not_overflow() {
    let mut pace = Pace::new(rate(1));
    pace.delay(Duration::MAX, u64::MAX);
    pace.delay(Duration::ZERO, u64::MAX);
    pace.set_rate(Duration::MAX, rate(u64::MAX));
    pace.delay(Duration::MAX, u64::MAX);
}
