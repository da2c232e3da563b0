//! The wait for a person between the guest's stop and its switch, where that was asked for.

use std::time::Duration;

use super::{Source, State};
use crate::migrate::report::microseconds;

impl Source {
    /// Whether the guest stands still until a person says [`Input::Continue`](super::Input::Continue), or cancels.
    pub fn waits_before_switchover(&self) -> bool {
        self.state == State::PreSwitchover
    }

    /// The guest stands still and is to be handed over: at once, or when a person says so.
    pub(super) fn begin_switchover(&mut self, now: Duration) {
        self.sent_package_at = now;
        let next = if self.pause_before_switchover { State::PreSwitchover } else { State::LastPass };
        self.enter(next, None);
    }

    /// A person says so. What was harvested when the guest stopped is still all: its vCPUs stand still, its devices were drained before
    /// they were saved, and nobody else writes its RAM.
    pub(super) fn on_continue(&mut self, now: Duration) {
        self.report.downtime.pre_switchover_us = microseconds(now.saturating_sub(self.sent_package_at));
        self.sent_package_at = now;
        self.enter(State::LastPass, None);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Action, Bulk, Config, Input, Poll, Stopped};
    use super::*;
    use crate::memory::PageSet;
    use crate::migrate::report::{Mode, Status};
    use crate::migrate::wire::{Channel, Frame};

    const NOW: Duration = Duration::from_secs(1);
    const LATER: Duration = Duration::from_secs(3600);

    /// A migration whose guest stands still; a person is waited for.
    fn waiting(mode: Mode) -> Source {
        let downtime_limit = Duration::from_millis(50);
        let mut source = Source::new(Config { mode, downtime_limit, ram_pages: 64, session: 1, machine: Vec::new() });
        source.handle(Input::PauseBeforeSwitchover(true), NOW);
        source.handle(Input::Continue, NOW);
        while !source.waits_before_switchover() {
            let Poll::Act(action) = source.poll(NOW) else { continue };
            let answer = match action {
                Action::Send(Frame::Hello(_)) => Input::Frame(Frame::Welcome("a test".into())),
                Action::Send(Frame::Setup { .. }) => Input::Frame(Frame::Prepared),
                Action::Send(Frame::PassEnd(_)) => Input::Frame(Frame::PassAck),
                Action::StartTracking => Input::Harvested(PageSet::full(64)),
                Action::Harvest => Input::Harvested(PageSet::empty(64)),
                Action::Stop => Input::Stopped(Stopped {
                    machine: vec![1],
                    dirty: PageSet::full(64),
                    bitmaps: Vec::new(),
                    stop_us: 10,
                    device_state_us: 20,
                    last_sync_us: 30,
                }),
                _ => continue,
            };
            source.handle(answer, NOW);
        }
        source
    }

    fn kinds(source: &mut Source, now: Duration) -> Vec<String> {
        let mut kinds = Vec::new();
        loop {
            match source.poll(now) {
                Poll::Wait(_) => return kinds,
                Poll::Act(Action::Send(frame)) => kinds.push(format!("{:?}", frame.kind())),
                Poll::Act(Action::End(_)) => return kinds,
                Poll::Act(action) => kinds.push(format!("{action:?}")),
                Poll::Bulk(Bulk::Pages { .. }) => kinds.push("pages".into()),
                Poll::Bulk(bulk) => kinds.push(format!("{bulk:?}")),
            }
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
            assert_eq!(kinds(&mut source, LATER), sent);
            source.handle(Input::Frame(Frame::Ready { load_us: 5, warnings: Vec::new() }), LATER + Duration::from_micros(7));
            kinds(&mut source, LATER + Duration::from_micros(7));
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
            assert_eq!(kinds(&mut source, LATER), ["Resume", "Abort"], "{end:?}");
            assert!(!source.may_be_waited_for());
        }
    }
}
