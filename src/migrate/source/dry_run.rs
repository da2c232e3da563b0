//! A migration that only asks how it would go: negotiated in full, a bounded part of RAM sent so that the link is measured, the dirty log
//! watched for a few seconds. Then the destination is told that this was all.

use std::time::Duration;

use super::{Action, Source, State};
use crate::memory::{PAGE_SIZE, PageSet};
use crate::migrate::forecast::Observed;
use crate::migrate::policy::Goal;
use crate::migrate::report::{Mode, Status};
use crate::migrate::wire::Frame;

/// Sent at most, in pages: 64 MiB.
const PROBE_PAGES: u64 = 16_384;
/// Sent for at most this long.
const PROBE_TIME: Duration = Duration::from_secs(2);
/// When dirtied pages are counted, in milliseconds since the watch began.
const LOOKS: [u64; 7] = [50, 100, 200, 500, 1000, 2000, 3000];

/// What has been watched so far.
#[derive(Clone, Debug, Default)]
pub(super) struct DryRun {
    observed: Observed,
    /// Once the link is measured: when the watch began.
    watching_since: Option<Duration>,
    dirtied: Option<PageSet>,
}

impl Source {
    /// As [`Source::new`], but moves nothing: it ends with [`Outcome::NotMoved`](super::Outcome::NotMoved) and forecasts in the report.
    pub fn dry_run(config: super::Config) -> Self {
        Source { dry_run: Some(DryRun::default()), ..Source::new(config) }
    }

    /// Whether enough was sent.
    pub(super) fn has_probed(&self, now: Duration) -> bool {
        let sent = self.pass.sent;
        self.dry_run.is_some() && (sent.normal + sent.zero >= PROBE_PAGES || now.saturating_sub(self.pass.began) >= PROBE_TIME)
    }

    /// What was sent has arrived.
    pub(super) fn on_probe_arrived(&mut self, now: Duration) {
        let (sent, took) = (self.pass.sent, now.saturating_sub(self.pass.began));
        let bandwidth = self.pass_bandwidth();
        let Some(dry_run) = &mut self.dry_run else { return };
        dry_run.observed.bandwidth = bandwidth;
        // Where next to nothing was sent, the time went into asking.
        dry_run.observed.throughput = if bandwidth == 0 { 100e6 } else { (sent.normal * PAGE_SIZE as u64) as f64 / took.as_secs_f64() };
        self.actions.push_back(Action::Watch);
        self.enter(State::Harvesting, None);
    }

    /// The answer to each harvest of a dry run.
    pub(super) fn on_dry_run_harvest(&mut self, dirty: &PageSet, now: Duration) {
        let Some(dry_run) = &mut self.dry_run else { return };
        if self.pass.number == 0 {
            dry_run.observed.pages = dirty.len();
            self.outgoing.begin_pass(dirty);
            return self.begin_pass(now);
        }
        let (Some(since), Some(dirtied)) = (dry_run.watching_since, &mut dry_run.dirtied) else {
            dry_run.watching_since = Some(now);
            dry_run.dirtied = Some(PageSet::empty(dirty.universe()));
            return self.look_again(now, now);
        };
        self.fixed.harvest = now.saturating_sub(self.asked_at);
        dirtied.union(dirty);
        dry_run.observed.dirtied.push((self.asked_at.saturating_sub(since), dirtied.len()));
        self.look_again(since, now);
    }

    fn look_again(&mut self, since: Duration, now: Duration) {
        let looked = self.dry_run.as_ref().map_or(0, |dry_run| dry_run.observed.dirtied.len());
        match LOOKS.get(looked) {
            Some(look) => self.enter(State::Watching, Some(since + Duration::from_millis(*look))),
            None => self.tell_forecasts(now),
        }
    }

    fn tell_forecasts(&mut self, now: Duration) {
        let Some(DryRun { observed, .. }) = self.dry_run.take() else { return };
        let observed = Observed { fixed: self.fixed, postcopy_limit: self.postcopy_bandwidth, ..observed };
        let goal = Goal { postcopy_requested: false, ..self.goal() };
        self.report.forecasts = [Mode::Auto, Mode::Precopy, Mode::Postcopy].map(|mode| observed.forecast(&Goal { mode, ..goal })).to_vec();
        let (watched, dirtied) = observed.dirtied.last().copied().unwrap_or_default();
        self.report.reason = format!(
            "nothing was moved; {} MB are to be sent at {:.0} MB/s, of which {} MB were dirtied within {:.1} s",
            observed.pages * PAGE_SIZE as u64 / 1_000_000,
            observed.throughput / 1e6,
            dirtied * PAGE_SIZE as u64 / 1_000_000,
            watched.as_secs_f64(),
        );
        // In the switch's place: a destination that hears it there waits for the migration itself.
        self.send(Frame::Goodbye);
        self.finish(Status::Cancelled, now);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Bulk, Config, Input, Outcome, Poll, Sent};
    use std::num::NonZeroU64;

    use super::*;
    use crate::memory::{HostPage, PageRun};
    use crate::migrate::layout::Layout;
    use crate::migrate::wire::VERSION;

    const PAGES: u64 = 1 << 18;

    /// Carries a dry run through over a link of 400 MB/s; the guest dirties a thousand pages between two looks.
    fn carry_through(mut source: Source) -> (Vec<Action>, u64) {
        let (mut now, mut done, mut sent, mut looks) = (Duration::ZERO, Vec::new(), 0, 0);
        loop {
            match source.poll(now) {
                Poll::Bulk(Bulk::Pages { channel, runs, .. }) => {
                    let pages: u64 = runs.iter().map(|run| run.count).sum();
                    let busy = Duration::from_micros(pages * 10);
                    now += busy;
                    sent += pages;
                    source.sent(channel, Sent { normal: pages, bytes: pages * 4112, busy, ..Sent::default() });
                }
                Poll::Bulk(bulk) => panic!("{bulk:?}"),
                Poll::Wait(until) => now = until.expect("nobody says anything any more"),
                Poll::Act(action) => {
                    let pages = |first, count| {
                        let mut pages = PageSet::empty(PAGES);
                        pages.insert(PageRun::new(first, count));
                        Some(Input::Harvested(pages))
                    };
                    let answer = match &action {
                        Action::Send(Frame::Hello(_)) => Some(Input::Frame(Frame::Welcome { version: VERSION, program: "a test".into() })),
                        Action::Send(Frame::Setup(_)) => Some(Input::Frame(Frame::Prepared)),
                        Action::Send(Frame::PassEnd(_)) => Some(Input::Frame(Frame::PassAck)),
                        Action::StartTracking => pages(0, PAGES / 2),
                        Action::Watch => pages(0, PAGES),
                        Action::Harvest => {
                            looks += 1;
                            pages(looks * 1000, 1000)
                        }
                        _ => None,
                    };
                    done.push(action);
                    if let Some(Action::End(_)) = done.last() {
                        return (done, sent);
                    }
                    answer.into_iter().for_each(|answer| source.handle(answer, now));
                }
            }
        }
    }

    #[test]
    fn a_dry_run_measures_and_moves_nothing() {
        let downtime_limit = Duration::from_millis(50);
        let config = Config {
            mode: Mode::Auto,
            downtime_limit,
            layout: Layout::new(PAGES, HostPage::SMALL, &[]).unwrap(),
            page_channels: 1,
            session: 1,
            machine: Vec::new(),
        };
        let mut source = Source::dry_run(config);
        source.handle(Input::StartPostcopy, Duration::ZERO);
        source.handle(Input::PostcopyBandwidth(NonZeroU64::new(100_000_000)), Duration::ZERO);
        let (done, sent) = carry_through(source);
        assert!((PROBE_PAGES..PROBE_PAGES + 512).contains(&sent), "{sent}");
        assert!(!done.iter().any(|action| matches!(action, Action::Stop | Action::GiveUp | Action::Throttle(_))), "{done:?}");
        assert_eq!(done.iter().filter(|action| **action == Action::Harvest).count(), LOOKS.len());
        let [.., Action::Send(Frame::Goodbye), Action::End(outcome)] = &done[..] else { panic!("{done:?}") };
        let Outcome::NotMoved(report) = &**outcome else { panic!("{outcome:?}") };
        assert_eq!((report.status, report.error.as_ref()), (Status::Cancelled, None));
        let modes: Vec<_> = report.forecasts.iter().map(|forecast| (forecast.mode, forecast.ends)).collect();
        assert_eq!(modes, [(Mode::Auto, true), (Mode::Precopy, true), (Mode::Postcopy, true)], "{report:?}");
        // Half of RAM: 1.3 s at 400 MB/s, 5.4 s at postcopy's limit.
        let times: Vec<_> = report.forecasts.iter().map(|forecast| forecast.total_us / 100_000).collect();
        assert!(matches!(times[..], [13 | 14, 13 | 14, 53 | 54]), "{report:?}");
    }

    #[test]
    fn a_dry_run_can_be_cancelled() {
        let config = Config {
            mode: Mode::Auto,
            downtime_limit: Duration::ZERO,
            layout: Layout::new(PAGES, HostPage::SMALL, &[]).unwrap(),
            page_channels: 1,
            session: 1,
            machine: Vec::new(),
        };
        let mut source = Source::dry_run(config);
        source.handle(Input::Cancel, Duration::ZERO);
        let (done, _) = carry_through(source);
        let Some(Action::End(outcome)) = done.last() else { panic!("{done:?}") };
        assert!(outcome.report().forecasts.is_empty() && outcome.report().error.is_some());
    }
}
