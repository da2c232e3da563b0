//! What tests/sim does not look at: how much is missing when a loss is told.

use super::*;
use crate::memory::PageRun;

const NOW: Duration = Duration::ZERO;

/// Takes pages of a guest of 16 pages.
fn receiving() -> Destination {
    let mut destination = Destination::new();
    for channel in [Channel::Main, Channel::Urgent, Channel::Pages(0)] {
        destination.hello(&Hello { channel, session: 1, link: 0, program: "a test".into() }, NOW).unwrap();
    }
    go_on(
        &mut destination,
        [frame(Frame::Setup { ram_pages: 16, postcopy: true, page_channels: 1, machine: Vec::new() }), Input::Prepared],
    );
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

/// Zero pages come, and are placed.
fn zero(destination: &mut Destination, run: PageRun) {
    assert_eq!(destination.zero(Channel::Pages(0), &[run]), Ok((Placement::Fault, vec![run])));
    destination.placed(run, NOW);
}

fn lost() -> Input {
    Input::Lost(Link(0), Channel::Urgent, "cut".into())
}

/// Does what is to be done until the link is closed; how many pages are missing then.
fn missing_when_told(destination: &mut Destination) -> u64 {
    loop {
        match destination.poll(NOW) {
            Poll::Act(Action::Disconnect(_)) => return destination.missing().len(),
            Poll::Act(_) => {}
            Poll::Wait(_) => panic!("the loss was not told"),
        }
    }
}

#[test]
fn zero_pages_that_have_come_are_not_missing_when_the_loss_is_told() {
    let mut destination = running();
    zero(&mut destination, PageRun::new(0, 4));
    zero(&mut destination, PageRun::new(8, 2));
    destination.handle(lost());
    assert_eq!(missing_when_told(&mut destination), 10);
    assert!(destination.is_paused());
}

#[test]
fn a_loss_after_which_nothing_is_missing_completes() {
    let mut destination = running();
    zero(&mut destination, PageRun::new(0, 16));
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

/// Whether the next thing to be done is to acknowledge the pass.
fn acknowledges(destination: &mut Destination) -> bool {
    let mut acknowledged = false;
    while let Poll::Act(action) = destination.poll(NOW) {
        acknowledged |= action == Action::Send(Channel::Main, Frame::PassAck);
    }
    acknowledged
}

#[test]
fn a_pass_is_acknowledged_when_its_last_page_is_in_place() {
    let mut destination = receiving();
    destination.handle(frame(Frame::PassEnd(Totals { normal: 3, zero: 2 })));
    assert!(!acknowledges(&mut destination));
    assert_eq!(destination.pages(Channel::Pages(0), PageRun::new(0, 3)), Ok(Placement::Direct));
    assert_eq!(destination.zero(Channel::Pages(0), &[PageRun::new(2, 2)]), Ok((Placement::Direct, vec![PageRun::new(2, 1)])));
    destination.received(Totals { normal: 0, zero: 2 });
    assert!(!acknowledges(&mut destination), "pages are still being read");
    destination.received(Totals { normal: 3, zero: 0 });
    assert!(acknowledges(&mut destination));
}

#[test]
fn more_pages_than_were_sent_end_the_migration() {
    let mut destination = receiving();
    destination.pages(Channel::Pages(0), PageRun::new(0, 3)).unwrap();
    destination.received(Totals { normal: 3, zero: 0 });
    let last = go_on(&mut destination, [frame(Frame::PassEnd(Totals { normal: 2, zero: 0 }))]);
    let Some(Action::End(Outcome::Abandoned(reason))) = last else { panic!("{last:?}") };
    assert!(reason.contains("sent 2 pages"), "{reason}");
}

#[test]
fn pages_come_on_their_own_connections_and_each_of_those_is_one() {
    let mut destination = receiving();
    assert!(destination.pages(Channel::Main, PageRun::new(0, 1)).is_err());
    assert!(destination.pages(Channel::Urgent, PageRun::new(0, 1)).is_err());
    for channel in [Channel::Pages(0), Channel::Pages(MAX_PAGE_CHANNELS), Channel::Pages(255)] {
        let hello = Hello { channel, session: 1, link: 0, program: "a test".into() };
        assert!(destination.hello(&hello, NOW).is_err(), "{channel:?}");
    }
}
