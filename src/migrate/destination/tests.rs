//! What tests/sim does not look at: the words in which a loss is told.

use super::*;

const NOW: Duration = Duration::ZERO;

/// A guest of 16 pages that runs, all of which are missing.
fn running() -> Destination {
    let mut destination = Destination::new();
    for channel in [Channel::Main, Channel::Urgent] {
        destination.hello(&Hello { channel, session: 1, program: "a test".into() }, NOW).unwrap();
    }
    let package =
        Package { sent: Totals::default(), postcopy: true, missing: vec![PageRun::new(0, 16)], bitmaps: Vec::new(), machine: Vec::new() };
    for input in [
        Input::Frame(Channel::Main, Frame::Setup { ram_pages: 16, postcopy: true, machine: Vec::new() }),
        Input::Prepared,
        Input::Frame(Channel::Main, Frame::Switchover(package)),
        Input::Loaded { load_us: 1, warnings: Vec::new() },
        Input::Frame(Channel::Main, Frame::Commit),
        Input::Ran(1),
    ] {
        destination.handle(input);
        while let Poll::Act(_) = destination.poll(NOW) {}
    }
    assert_eq!((destination.status(), destination.missing().len()), (Status::PostcopyActive, 16));
    destination
}

fn zero(run: PageRun) -> Input {
    Input::Frame(Channel::Main, Frame::Zero(vec![run]))
}

fn lost() -> Input {
    Input::Lost(Channel::Urgent, "cut".into())
}

/// Does what is to be done until the end.
fn end(mut destination: Destination) -> Outcome {
    loop {
        match destination.poll(NOW) {
            Poll::Act(Action::End(outcome)) => return outcome,
            Poll::Act(Action::PlaceZero(run)) => destination.placed(run, NOW),
            Poll::Act(_) => {}
            Poll::Wait(_) => panic!("no end"),
        }
    }
}

fn incomplete(missing: u64) -> Outcome {
    Outcome::Incomplete(format!("the connection to the source was lost: cut; {missing} pages are missing"))
}

#[test]
fn a_loss_counts_neither_what_was_placed_nor_zeros_that_have_come() {
    let mut destination = running();
    assert_eq!(destination.pages(Channel::Main, PageRun::new(0, 5)), Ok(Placement::Fault));
    destination.placed(PageRun::new(0, 5), NOW);
    destination.handle(zero(PageRun::new(4, 3)));
    destination.handle(lost());
    assert_eq!(end(destination), incomplete(9));
}

#[test]
fn a_loss_when_only_zeros_that_have_come_are_missing_is_none() {
    let mut destination = running();
    destination.handle(zero(PageRun::new(0, 16)));
    destination.handle(lost());
    assert_eq!(destination.status(), Status::Completed);
    assert_eq!(end(destination), Outcome::Completed);
}

#[test]
fn a_loss_while_zeros_are_being_placed_does_not_count_them() {
    for (count, outcome) in [(10, incomplete(6)), (16, Outcome::Completed)] {
        let mut destination = running();
        let run = PageRun::new(0, count);
        destination.handle(zero(run));
        assert_eq!(destination.poll(NOW), Poll::Act(Action::PlaceZero(run)));
        // By another thread.
        destination.handle(lost());
        destination.placed(run, NOW);
        assert_eq!(end(destination), outcome);
    }
}
