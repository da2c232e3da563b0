use super::*;

#[test]
fn shares_are_disjoint_and_complete() {
    for pages in [0, 1, 5, 1000, 1 << 40] {
        for cpus in 1..=32 {
            let mut next = 0;
            for cpu in 0..cpus {
                let (first, count) = share(pages, cpus, cpu);
                assert_eq!(first, next);
                next += count;
            }
            assert_eq!(next, pages);
        }
    }
}

#[test]
fn sequential_comes_round() {
    let mut picker = Picker::new(Order::Sequential, 3, 0);
    let picked: Vec<_> = (0..7).map(|_| picker.pick()).collect();
    assert_eq!(picked, [0, 1, 2, 0, 1, 2, 0]);
}

#[test]
fn random_reaches_everything_and_nothing_else() {
    for order in [Order::Random, Order::HotCold] {
        for count in [1, 2, 9, 10, 11, 1000] {
            let mut picker = Picker::new(order, count, 1);
            let mut seen = vec![false; count as usize];
            (0..count * 200).for_each(|_| seen[picker.pick() as usize] = true);
            assert!(seen.iter().all(|&seen| seen), "{order:?} {count}");
        }
    }
}

#[test]
fn hotcold_is_nine_to_one() {
    let mut picker = Picker::new(Order::HotCold, 1000, 2);
    let hot = (0..100_000).filter(|_| picker.pick() < 100).count();
    assert!((89_000..91_000).contains(&hot), "{hot}");
}

#[test]
fn a_pacer_keeps_its_rate_and_drops_a_long_backlog() {
    let mut pacer = Pacer::new(Rate::PerSecond(1000), 1_000_000, 0);
    let done = (0..1_000_000).filter(|&now| pacer.due(now)).count();
    assert_eq!(done, 1000);
    // Ten seconds later only the last hundredth of a second is caught up on.
    let done = (0..100).filter(|_| pacer.due(11_000_000)).count();
    assert_eq!(done, 11);
    assert!(!Pacer::new(Rate::PerSecond(0), 1_000_000, 0).due(u64::MAX));
    let mut pacer = Pacer::new(Rate::Max, 1_000_000, 0);
    assert!((0..10).all(|_| pacer.due(0)));
}
