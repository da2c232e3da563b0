//! What happens around the switch, moment by moment; whole migrations are in tests/sim.

use super::*;
use crate::memory::{PageNumber, PageSet};
use crate::migrate::wire::Holding;

const NOW: Duration = Duration::from_secs(1);
const LATER: Duration = Duration::from_secs(3600);
const PAGES: u64 = 4096;

fn config(mode: Mode) -> Config {
    Config {
        mode,
        downtime_limit: Duration::from_millis(50),
        layout: Layout::new(PAGES, HostPage::SMALL, &[]).unwrap(),
        page_channels: 1,
        session: 1,
        machine: Vec::new(),
    }
}

/// Does what the engine says until the guest has just been stopped, with so many pages dirtied until then.
fn stopped(source: Source, dirtied: u64) -> Source {
    stopped_with(source, dirtied, 0)
}

/// The same; the guest brings so many of these pages along.
fn stopped_with(mut source: Source, dirtied: u64, rest: u64) -> Source {
    loop {
        let action = match source.poll(NOW) {
            Poll::Act(action) => action,
            Poll::Bulk(Bulk::Pages { channel, .. }) => {
                source.sent(channel, Sent::default());
                continue;
            }
            other => panic!("{other:?}"),
        };
        let stop = action == Action::Stop;
        let answer = match action {
            Action::Send(Frame::Hello(_)) => Input::Frame(Frame::Welcome { version: VERSION, program: "a test".into() }),
            Action::Send(Frame::Setup { .. }) => Input::Frame(Frame::Prepared),
            Action::Send(Frame::PassEnd(_)) => Input::Frame(Frame::PassAck),
            Action::StartTracking => Input::Harvested(PageSet::full(PAGES)),
            Action::Harvest => Input::Harvested(PageSet::empty(PAGES)),
            Action::Stop => {
                let mut dirty = PageSet::empty(PAGES);
                dirty.insert(PageRun::new(0, dirtied));
                Input::Stopped(Box::new(Stopped {
                    machine: vec![1],
                    rest: (0..rest).map(PageNumber).collect(),
                    dirty,
                    bitmaps: Vec::new(),
                    stop_us: 10,
                    device_state_us: 20,
                    last_sync_us: 30,
                }))
            }
            _ => continue,
        };
        source.handle(answer, NOW);
        if stop {
            return source;
        }
    }
}

/// A migration whose guest stands still; a person is waited for.
fn waiting(mode: Mode) -> Source {
    let mut source = Source::new(config(mode));
    source.handle(Input::PauseBeforeSwitchover(true), NOW);
    // Too early to mean anything.
    source.handle(Input::Continue, NOW);
    let source = stopped(source, 60);
    assert!(source.waits_before_switchover());
    source
}

/// What is done until there is nothing to do.
fn done(source: &mut Source, now: Duration) -> Vec<String> {
    let mut done = Vec::new();
    loop {
        match source.poll(now) {
            Poll::Wait(_) => return done,
            Poll::Act(Action::Send(frame)) => done.push(format!("{:?}", frame.kind())),
            Poll::Act(Action::End(_)) => return done,
            Poll::Act(action) => done.push(format!("{action:?}")),
            Poll::Bulk(Bulk::Pages { channel, .. }) => {
                source.sent(channel, Sent::default());
                done.push("pages".into());
            }
            Poll::Bulk(bulk) => done.push(format!("{bulk:?}")),
        }
    }
}

#[test]
fn what_the_guest_brings_along_is_not_sent_again_in_precopy() {
    for (mode, unsent) in [(Mode::Precopy, 0), (Mode::Postcopy, PAGES)] {
        let mut source = stopped_with(Source::new(config(mode)), 60, 60);
        assert_eq!(source.unsent().len(), unsent, "{mode:?}: what may be old at the destination stays missing there");
        assert_eq!(done(&mut source, NOW), ["Switchover"]);
    }
}

#[test]
fn only_who_understands_it_gets_pages_with_the_guest() {
    for (version, in_precopy, in_postcopy) in [(3, false, false), (4, false, true), (5, true, true)] {
        let mut source = Source { version, ..Source::new(config(Mode::Auto)) };
        assert_eq!(matches!(source.companions(), Companions::Rest(_)), in_precopy);
        source.switch_postcopy = true;
        assert_eq!(source.companions() == Companions::Hot, in_postcopy);
    }
}

#[test]
fn nothing_is_sent_and_no_time_limit_runs_until_a_person_says_so() {
    for (mode, sent) in [(Mode::Precopy, vec!["pages", "Switchover"]), (Mode::Postcopy, vec!["Switchover"])] {
        let mut source = waiting(mode);
        assert_eq!((source.poll(LATER), source.stage().0), (Poll::Wait(None), Status::PreSwitchover));
        // Not to be waited for any more, but this wait is a person's to end.
        source.handle(Input::PauseBeforeSwitchover(false), LATER);
        assert_eq!(source.poll(LATER), Poll::Wait(None));
        source.handle(Input::Continue, LATER);
        assert_eq!(done(&mut source, LATER), sent);
        source.handle(Input::Frame(Frame::Ready { load_us: 5, warnings: Vec::new() }), LATER + Duration::from_micros(7));
        done(&mut source, LATER + Duration::from_micros(7));
        source.handle(Input::Frame(Frame::Running(1)), LATER + Duration::from_micros(9));
        let downtime = source.report.downtime;
        assert_eq!((downtime.pre_switchover_us, downtime.transfer_us), ((LATER - NOW).as_micros() as u64, 2));
        assert_eq!(downtime.total_us, downtime.pre_switchover_us + 10 + 20 + 30 + 9);
        assert!(downtime.predicted_us < 50_000, "{downtime:?}");
    }
}

#[test]
fn whatever_ends_the_wait_lets_the_guest_go_on() {
    let ends = [
        Input::Cancel,
        Input::GuestEnded("it powered off".into()),
        Input::Lost(Channel::Main, "cut".into()),
        Input::Lost(Channel::Urgent, "cut".into()),
        Input::Frame(Frame::Abort("nobody wants it".into())),
        Input::Frame(Frame::Prepared),
        Input::Failed("something".into()),
    ];
    for end in ends {
        let mut source = waiting(Mode::Auto);
        source.handle(end.clone(), LATER);
        assert_eq!(done(&mut source, LATER), ["Resume", "Abort"], "{end:?}");
        assert!(!source.may_be_waited_for());
    }
}

#[test]
fn a_guest_that_was_about_to_go_on_goes_on_when_the_migration_ends_at_that_moment() {
    // Too much was dirtied until it stood still: another pass.
    let mut source = stopped(Source::new(Config { downtime_limit: Duration::ZERO, ..config(Mode::Precopy) }), 1000);
    source.handle(Input::Cancel, NOW);
    assert_eq!(done(&mut source, NOW), ["Resume", "Abort"]);
}

#[test]
fn a_guest_that_was_slowed_down_is_not_when_the_migration_ends_as_it_stops() {
    let mut source = Source::new(config(Mode::Precopy));
    source.set_throttle(50);
    let mut source = stopped(source, 60);
    source.handle(Input::Cancel, NOW);
    assert_eq!(done(&mut source, NOW), ["Throttle(0)", "Resume", "Abort"]);
}

#[test]
fn a_destination_that_never_confirms_the_end_is_a_lost_link() {
    let mut source = stopped(Source::new(config(Mode::Postcopy)), 60);
    done(&mut source, NOW);
    source.handle(Input::Frame(Frame::Ready { load_us: 5, warnings: Vec::new() }), NOW);
    let ending = NOW + LONGEST_CALM;
    done(&mut source, NOW);
    assert_eq!(done(&mut source, ending).last().map(String::as_str), Some("End"));
    assert_eq!(source.poll(END_TIMEOUT), Poll::Wait(Some(ending + END_TIMEOUT)));
    let Poll::Act(Action::Disconnect(text)) = source.poll(ending + END_TIMEOUT) else { panic!("it is waited for") };
    assert!(text.contains("did not confirm what it was sent in time") && source.is_paused(), "{text}");
}

#[test]
fn a_guest_that_has_come_gets_what_it_asks_for_before_the_rest_goes() {
    let ready = || Input::Frame(Frame::Ready { load_us: 5, warnings: Vec::new() });
    let ran = || Input::Frame(Frame::Running(1));
    let mut postcopy = stopped(Source::new(config(Mode::Postcopy)), 60);
    done(&mut postcopy, NOW);
    postcopy.handle(ready(), NOW);
    assert_eq!(done(&mut postcopy, NOW), ["GiveUp", "Commit"]);
    postcopy.handle(ran(), NOW);
    postcopy.request(PageRun::new(7, 1)).unwrap();
    assert_eq!((done(&mut postcopy, NOW), postcopy.next_requested()), (vec![], Some(PageRun::new(7, 1))));
    assert_eq!(postcopy.poll(NOW), Poll::Wait(Some(NOW + CALM)));
    assert_eq!(done(&mut postcopy, NOW + CALM).first().map(String::as_str), Some("pages"));
    // One that has everything is not disturbed until it runs, but not waited for for long either.
    let mut precopy = stopped(Source::new(config(Mode::Precopy)), 60);
    done(&mut precopy, NOW);
    precopy.handle(ready(), NOW);
    assert_eq!(done(&mut precopy, NOW), ["GiveUp", "Commit"]);
    assert_eq!(precopy.poll(NOW), Poll::Wait(Some(NOW + LONGEST_CALM)));
    precopy.handle(ran(), NOW);
    assert_eq!(done(&mut precopy, NOW), ["End"]);
}

#[test]
fn the_guest_stood_still_no_longer_because_the_source_heard_late_that_it_ran() {
    let us = Duration::from_micros;
    for (committed, waited) in [(true, Duration::ZERO), (false, LATER - NOW)] {
        let mut source = stopped(Source::new(config(Mode::Postcopy)), 60);
        done(&mut source, NOW);
        source.handle(Input::Frame(Frame::Ready { load_us: 5, warnings: Vec::new() }), NOW + us(7));
        done(&mut source, NOW + us(9));
        source.handle(Input::Lost(Channel::Main, "cut".into()), NOW + us(10));
        done(&mut source, NOW + us(10));
        assert!(source.is_paused());
        source.handle(Input::Recover, LATER);
        done(&mut source, LATER);
        let holding = Holding { committed, missing: Vec::new(), bitmaps: Default::default() };
        for frame in [Frame::Welcome { version: VERSION, program: "a test".into() }, Frame::Holding(holding)] {
            source.handle(Input::Frame(frame), LATER);
        }
        done(&mut source, LATER + us(9));
        source.handle(Input::Frame(Frame::Running(11)), LATER + us(50));
        // Until READY, then until the commit that counted was said, then until the guest ran.
        assert_eq!(source.report.downtime.total_us, 10 + 20 + 30 + 9 + waited.as_micros() as u64 + 11);
    }
}

#[test]
fn a_destination_that_does_not_know_how_to_take_disks_is_told_from_one_that_does() {
    for (version, goes_on) in [(1, false), (2, false), (VERSION, true)] {
        let layout = Layout::new(PAGES, HostPage::SMALL, &[0, 40]).unwrap();
        let mut source = Source::new(Config { layout, ..config(Mode::Auto) });
        done(&mut source, NOW);
        source.handle(Input::Frame(Frame::Welcome { version, program: "ferry 0.0".into() }), NOW);
        let done = done(&mut source, NOW);
        assert_eq!(done.iter().any(|done| done == "Setup"), goes_on, "{done:?}");
        let error = source.report.error.unwrap_or_default();
        assert_eq!(error.contains("(ferry 0.0) does not know how to take disks; it needs a newer version"), !goes_on, "{error}");
    }
}
