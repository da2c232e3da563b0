//! What tests/sim does not look at: how much is missing when a loss is told.

use super::*;
use crate::memory::PageNumber;
use crate::migrate::incoming::FaultAnswer;

const NOW: Duration = Duration::ZERO;

fn setup(ram_pages: u64, host_page: HostPage) -> Setup {
    Setup { ram_pages, host_page, huge: Vec::new(), postcopy: true, page_channels: 1, machine: Vec::new(), disks: Vec::new() }
}

/// Takes pages of a guest of 16 pages.
fn receiving() -> Destination {
    set_up(setup(16, HostPage::SMALL))
}

fn set_up(setup: Setup) -> Destination {
    let mut destination = Destination::new();
    for channel in [Channel::Main, Channel::Urgent, Channel::Pages(0)] {
        destination.hello(&Hello { channel, session: 1, link: 0, program: "a test".into(), version: VERSION }, NOW).unwrap();
    }
    go_on(&mut destination, [frame(Frame::Setup(setup)), Input::Prepared]);
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
fn nonsense_on_a_link_that_was_replaced_does_not_break_the_new_one() {
    let mut destination = running();
    destination.handle(lost());
    destination.hello(&Hello { channel: Channel::Main, session: 1, link: 1, program: "a test".into(), version: VERSION }, NOW).unwrap();
    go_on(&mut destination, [Input::Nonsense(Link(0), "late".into())]);
    assert!(!destination.is_paused());
    go_on(&mut destination, [Input::Nonsense(Link(1), "now".into())]);
    assert!(destination.is_paused());
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
    let hello = |session, link| Hello { channel: Channel::Main, session, link, program: "a test".into(), version: VERSION };
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
        let hello = Hello { channel, session: 1, link: 0, program: "a test".into(), version: VERSION };
        assert!(destination.hello(&hello, NOW).is_err(), "{channel:?}");
    }
}

/// Whether a destination in this state takes `frame` from the source.
fn takes(mut destination: Destination, frame: Frame) -> bool {
    destination.handle(self::frame(frame));
    destination.status() != Status::Failed
}

#[test]
fn the_list_of_huge_pages_is_checked() {
    let huge = |first: u64, count: u64| PageRun::new(first * 512, count * 512);
    let takes_list = |list: &[PageRun]| {
        let setup = Setup { huge: list.to_vec(), ..setup(64 * 512, HostPage::SMALL) };
        set_up(setup).status() != Status::Failed
    };
    assert!(takes_list(&[huge(0, 2), huge(2, 1), huge(63, 1)]));
    let wrong = [PageRun::new(3, 512), PageRun::new(512, 5), huge(63, 2), huge(0, 0), PageRun::new(u64::MAX - 511, 512)];
    assert!(wrong.into_iter().all(|run| !takes_list(&[run])));
    assert!(!takes_list(&[huge(1, 1), huge(0, 1)]) && !takes_list(&[huge(0, 2), huge(1, 1)]));
    let many: Vec<_> = (0..=MAX_RANGES as u64).map(|number| huge(2 * number, 1)).collect();
    let setup = Setup { huge: many, ..setup(1 << 30, HostPage::SMALL) };
    let mut destination = Destination::new();
    destination.hello(&Hello { channel: Channel::Main, session: 1, link: 0, program: "a test".into(), version: VERSION }, NOW).unwrap();
    assert!(!takes(destination, Frame::Setup(setup)));
}

#[test]
fn of_host_pages_whole_ones_are_missing_and_come() {
    let host_page = HostPage::new(8).unwrap();
    assert_eq!(set_up(setup(12, host_page)).status(), Status::Failed);
    let package = |run| Package { sent: Totals::default(), postcopy: true, missing: vec![run], bitmaps: Vec::new(), machine: Vec::new() };
    for part in [PageRun::new(0, 4), PageRun::new(4, 8), PageRun::new(8, 9)] {
        assert!(!takes(set_up(setup(32, host_page)), Frame::Switchover(package(part))), "{part}");
    }
    let mut destination = set_up(setup(32, host_page));
    destination.handle(frame(Frame::Switchover(package(PageRun::new(8, 16)))));
    assert_eq!(destination.fault(PageNumber(11), NOW), FaultAnswer::Request(PageRun::new(8, 8)));
    assert_eq!(destination.fault(PageNumber(31), NOW), FaultAnswer::Zero(PageRun::new(24, 8)));
    let channel = Channel::Pages(0);
    for part in [PageRun::new(8, 4), PageRun::new(12, 8)] {
        assert!(destination.pages(channel, part).is_err() && destination.pages(Channel::Urgent, part).is_err(), "{part}");
        assert!(destination.zero(channel, &[PageRun::new(16, 8), part]).is_err(), "{part}");
    }
    assert_eq!(destination.pages(channel, PageRun::new(8, 8)), Ok(Placement::Fault));
    destination.placed(PageRun::new(8, 8), NOW);
    assert!(destination.waiting().is_empty());
    assert_eq!(destination.missing().len(), 8);
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
    let hello = Hello { channel: Channel::Main, session: 1, link: 1, program: "a test".into(), version: VERSION };
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

#[test]
fn pages_that_are_in_place_after_the_end_change_nothing() {
    let mut destination = receiving();
    destination.pages(Channel::Pages(0), PageRun::new(0, 1)).unwrap();
    let sent = Totals { normal: 1, zero: 0 };
    let package = Package { sent, postcopy: true, missing: Vec::new(), bitmaps: Vec::new(), machine: Vec::new() };
    let last = go_on(&mut destination, [frame(Frame::Switchover(package)), frame(Frame::Abort("cancelled".into()))]);
    assert_eq!(last, Some(Action::End(Outcome::Abandoned("cancelled".into()))));
    destination.received(sent);
    assert_eq!((destination.poll(NOW), destination.status()), (Poll::Wait(None), Status::Failed));
}

#[test]
fn what_was_counted_of_faults_is_told_once_and_stays() {
    let mut destination = running();
    for page in [3, 4] {
        destination.fault(PageNumber(page), NOW);
        assert_eq!(destination.prefetch(PageNumber(page)).len(), usize::from(page == 4));
    }
    // The page has been asked for in advance, is touched, and comes with all others before the fault has been dealt with to its end.
    assert_eq!(destination.fault(PageNumber(5), NOW), FaultAnswer::Wait);
    destination.placed(PageRun::new(0, 16), NOW);
    let told = destination.faults();
    assert_eq!(destination.prefetch(PageNumber(5)), []);
    destination.fault(PageNumber(7), NOW);
    assert_eq!(destination.faults(), told);
}
