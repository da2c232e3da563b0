use std::sync::Arc;

use super::*;
use crate::memory::dirty_tracker::Tracking;
use crate::memory::dirty_tracker::test_guest::{Guest, Means};
use crate::memory::ram::GRANULE;

fn rings(guest: &Guest) -> Arc<DirtyRings> {
    let Tracking::Ring(rings) = &guest.tracking else { panic!("not the ring") };
    rings.clone()
}

#[test]
fn full_rings_lose_nothing() {
    let mut guest = Guest::new(16 * GRANULE, Means::SmallRing);
    let (mut tracker, first) = guest.start();
    guest.clear_all(&mut tracker, &first);
    guest.vcpus[0].write(PageRun::new(512, 3000));
    guest.vcpus[1].write(PageRun::new(3000, 3000));
    assert!(guest.vcpus.iter().all(|vcpu| vcpu.full > 0));
    assert_eq!(guest.harvest(&mut tracker), (512..6000).collect::<Vec<_>>());
    assert!(guest.harvest(&mut tracker).is_empty());
    tracker.stop().unwrap();
}

#[test]
fn nothing_is_left_when_tracking_ends_or_begins() {
    let mut guest = Guest::new(4 * GRANULE, Means::SmallRing);
    let (tracker, _) = guest.start();
    guest.vcpus[1].write(PageRun::new(512, 100));
    tracker.stop().unwrap();
    let rings = rings(&guest);
    assert!(rings.state().dirty.is_empty());
    // A guest that moved away leaves its tracker on; the same machine is never tracked again, but nothing depends on that.
    let (tracker, _) = guest.start();
    guest.vcpus[1].write(PageRun::new(512, 100));
    rings.collect().unwrap();
    drop(tracker);
    let (mut tracker, first) = guest.start();
    assert!(first.contains(crate::memory::PageNumber(512)));
    assert!(guest.harvest(&mut tracker).is_empty());
}

#[test]
fn an_interrupted_reset_owes_everything_anew() {
    let mut guest = Guest::new(4 * GRANULE, Means::Ring);
    [40, 41].into_iter().for_each(|page| guest.write(page));
    let (mut tracker, first) = guest.start();
    guest.clear_all(&mut tracker, &first);
    guest.write(40);
    rings(&guest).state().interrupted = true;
    assert_eq!(guest.harvest(&mut tracker), [40, 41], "all that was ever written");
    guest.write(41);
    assert_eq!(guest.harvest(&mut tracker), [41], "protected again");
}

#[test]
fn entries_that_kvm_has_not_reset_are_reset_by_the_next_call() {
    let mut guest = Guest::new(4 * GRANULE, Means::Ring);
    let (mut tracker, first) = guest.start();
    guest.clear_all(&mut tracker, &first);
    guest.write(40);
    let rings = rings(&guest);
    // As if KVM had been interrupted before the first entry.
    let mut state = rings.state();
    let mut pages = Vec::new();
    let taken = state.rings[0].take(|slot, offset| pages.push((slot, offset)));
    assert!(pages.contains(&(0, 40)), "{pages:?}");
    state.unreset += taken;
    drop(state);
    rings.collect().unwrap();
    let state = rings.state();
    assert_eq!((state.unreset, state.interrupted), (0, false));
    drop(state);
    guest.write(40);
    assert_eq!(guest.harvest(&mut tracker), [40]);
}

#[test]
fn entries_for_pages_that_do_not_exist_end_the_harvest_and_not_the_guest() {
    let mut guest = Guest::new(GRANULE, Means::Ring);
    let (mut tracker, first) = guest.start();
    guest.clear_all(&mut tracker, &first);
    guest.write(40);
    let rings = rings(&guest);
    let pages = GRANULE / PAGE_SIZE as u64;
    for (slot, offset) in [(0, pages), (0, u64::MAX), (1, 0), (0x1_0000, 1)] {
        guest.write(40);
        let state = rings.state();
        let next = (state.rings[0].next % ENTRIES) as usize;
        state.rings[0].entries()[next].slot.store(slot, Ordering::Relaxed);
        state.rings[0].entries()[next].offset.store(offset, Ordering::Relaxed);
        drop(state);
        rings.collect().unwrap();
        let error = tracker.harvest(&mut PageSet::empty(pages)).unwrap_err();
        assert!(matches!(error, TrackerError::Entry { .. }), "{error}");
        // Start over: KVM was told to protect the wrong page.
        tracker.stop().unwrap();
        tracker = guest.start().0;
    }
}

#[test]
fn a_ring_is_taken_once_round() {
    let guest = Guest::new(4 * GRANULE, Means::SmallRing);
    let (tracker, _) = guest.start();
    let rings = rings(&guest);
    let mut state = rings.state();
    let ring = &mut state.rings[1];
    // Full to the last entry, and the first is dirty again behind the reader's back.
    ring.entries().iter().for_each(|entry| entry.flags.store(DIRTY, Ordering::Relaxed));
    let first: *const Entry = &ring.entries()[0];
    // SAFETY: an atomic in a mapping that `rings` keeps.
    let taken = ring.take(|_, _| unsafe { (*first).flags.store(DIRTY, Ordering::Relaxed) });
    assert_eq!(taken, u64::from(ring.count));
    drop(state);
    drop((tracker, guest));
}

#[test]
fn an_overrun_ring_ends_tracking_for_good() {
    let guest = Guest::new(4 * GRANULE, Means::SmallRing);
    let (mut tracker, _) = guest.start();
    let rings = rings(&guest);
    rings.state().rings[1].entries().iter().for_each(|entry| entry.flags.store(DIRTY, Ordering::Relaxed));
    rings.collect().unwrap();
    let overrun = |result: Result<(), TrackerError>| assert!(matches!(result, Err(TrackerError::Overrun)), "{result:?}");
    overrun(tracker.harvest(&mut PageSet::empty(guest.ram.pages())).map(|_| ()));
    overrun(rings.collect());
    overrun(tracker.stop());
    overrun(guest.tracking.start(&guest.ram, &mut PageSet::empty(guest.ram.pages())).map(|_| ()));
}
