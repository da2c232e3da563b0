//! What tests/sim does not look at: how much is missing when a loss is told.

use super::*;
use crate::memory::PageNumber;

const NOW: Duration = Duration::ZERO;

/// Takes pages of a guest of 16 pages.
fn receiving() -> Destination {
    let mut destination = Destination::new();
    for channel in [Channel::Main, Channel::Urgent] {
        destination.hello(&Hello { channel, session: 1, link: 0, program: "a test".into() }, NOW).unwrap();
    }
    go_on(&mut destination, [frame(Frame::Setup { ram_pages: 16, postcopy: true, machine: Vec::new() }), Input::Prepared]);
    destination
}

fn frame(frame: Frame) -> Input {
    Input::Frame(Link(0), Channel::Main, frame)
}

/// Takes these inputs and does what follows from each; the last that was to be done.
fn go_on(destination: &mut Destination, inputs: impl IntoIterator<Item = Input>) -> Option<Action> {
    let mut last = None;
    for input in inputs {
        destination.handle(input);
        while let Poll::Act(action) = destination.poll(NOW) {
            last = Some(action);
        }
    }
    last
}

/// A guest of 16 pages that runs, all of which are missing.
fn running() -> Destination {
    let mut destination = receiving();
    let package =
        Package { sent: Totals::default(), postcopy: true, missing: vec![PageRun::new(0, 16)], bitmaps: Vec::new(), machine: Vec::new() };
    let inputs =
        [frame(Frame::Switchover(package)), Input::Loaded { load_us: 1, warnings: Vec::new() }, frame(Frame::Commit), Input::Ran(1)];
    go_on(&mut destination, inputs);
    assert_eq!((destination.status(), destination.missing().len()), (Status::PostcopyActive, 16));
    destination
}

fn zero(run: PageRun) -> Input {
    Input::Frame(Link(0), Channel::Main, Frame::Zero(vec![run]))
}

fn lost() -> Input {
    Input::Lost(Link(0), Channel::Urgent, "cut".into())
}

/// Does what is to be done until the link is closed; how many pages are missing then.
fn missing_when_told(destination: &mut Destination) -> u64 {
    loop {
        match destination.poll(NOW) {
            Poll::Act(Action::Disconnect(_)) => return destination.missing().len(),
            Poll::Act(Action::PlaceZero(run)) => destination.placed(run, NOW),
            Poll::Act(_) => {}
            Poll::Wait(_) => panic!("the loss was not told"),
        }
    }
}

#[test]
fn zero_pages_that_have_come_are_not_missing_when_the_loss_is_told() {
    let mut destination = running();
    destination.handle(zero(PageRun::new(0, 4)));
    destination.handle(zero(PageRun::new(8, 2)));
    destination.handle(lost());
    assert_eq!(missing_when_told(&mut destination), 10);
    assert!(destination.is_paused());
}

#[test]
fn a_loss_after_which_nothing_is_missing_completes() {
    let mut destination = running();
    destination.handle(zero(PageRun::new(0, 16)));
    destination.handle(lost());
    assert_eq!(missing_when_told(&mut destination), 0);
    assert_eq!(destination.poll(NOW), Poll::Act(Action::Complete));
    assert_eq!(destination.status(), Status::Completed);
}

#[test]
fn a_dry_run_ends_where_the_switch_would_come() {
    let mut destination = receiving();
    let last = go_on(&mut destination, [frame(Frame::PassEnd(Totals::default())), frame(Frame::Goodbye)]);
    assert_eq!(last, Some(Action::End(Outcome::DryRun)));
    assert!(!destination.is_committed());
}

#[test]
fn a_source_that_comes_back_too_late_does_not_disturb_who_waits_now() {
    let mut destination = Destination::new();
    let hello = |session, link| Hello { channel: Channel::Main, session, link, program: "a test".into() };
    assert!(destination.hello(&hello(1, 1), NOW).unwrap_err().contains("is not here"));
    assert_eq!((destination.status(), destination.poll(NOW)), (Status::None, Poll::Wait(None)));
    destination.hello(&hello(2, 0), NOW).unwrap();
}

/// Polls at this second; until when to wait, if there is nothing to do.
fn waits(destination: &mut Destination, second: u64) -> Option<u64> {
    match destination.poll(Duration::from_secs(second)) {
        Poll::Wait(until) => until.map(|until| until.as_secs()),
        Poll::Act(Action::Disconnect(_)) => None,
        Poll::Act(action) => panic!("{action:?}"),
    }
}

#[test]
fn a_source_that_sends_none_of_the_pages_that_are_waited_for_is_lost() {
    let mut destination = running();
    assert_eq!(waits(&mut destination, 1000), Some(1005), "nobody waits, and nothing is owed");
    destination.fault(PageNumber(3), Duration::from_secs(1001));
    assert_eq!(waits(&mut destination, 1002), Some(1031));
    // Any page is a sign of life.
    destination.placed(PageRun::new(8, 1), Duration::from_secs(1030));
    assert_eq!(waits(&mut destination, 1059), Some(1060));
    assert_eq!(waits(&mut destination, 1060), None);
    assert!(destination.is_paused() && destination.lost().unwrap().contains("none of the pages"));

    // On a new link it has as much time again.
    let hello = Hello { channel: Channel::Main, session: 1, link: 1, program: "a test".into() };
    destination.hello(&hello, Duration::from_secs(5000)).unwrap();
    while let Poll::Act(_) = destination.poll(Duration::from_secs(5000)) {}
    assert_eq!(waits(&mut destination, 5029), Some(5030));
    destination.placed(PageRun::new(3, 1), Duration::from_secs(5029));
    assert_eq!(waits(&mut destination, 9000), Some(9005));
}

#[test]
fn a_source_that_says_nothing_after_ready_is_lost() {
    let mut destination = receiving();
    let package = Package { sent: Totals::default(), postcopy: true, missing: Vec::new(), bitmaps: Vec::new(), machine: Vec::new() };
    go_on(&mut destination, [frame(Frame::Switchover(package))]);
    destination.handle(Input::Loaded { load_us: 1, warnings: Vec::new() });
    let ready = destination.poll(Duration::from_secs(100));
    assert!(matches!(ready, Poll::Act(Action::Send(_, Frame::Ready { .. }))), "{ready:?}");
    assert_eq!(waits(&mut destination, 159), Some(160));
    assert_eq!(waits(&mut destination, 160), None);
    assert!(destination.is_paused() && !destination.is_committed());
}
