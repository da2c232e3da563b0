//! A source that hangs. Its kernel keeps the connections alive, so that only its silence tells; and silence says something only while a
//! word is owed: after READY, and while somebody in the guest waits for a page.

use std::time::Duration;

use super::{Destination, State};

/// How long the source may take after READY to give the guest up, for which its disks are flushed.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long no page may come while somebody waits for one, which no limit of the bandwidth holds back: as long as a dead link takes to be
/// noticed.
const PAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// How often to look whether somebody waits: who reports page faults wakes nobody for it.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

impl Destination {
    /// Since when the source owes a word, how long it may, and what happens then.
    fn owed(&self) -> Option<(Duration, Duration, &'static str)> {
        match self.state {
            _ if self.lost.is_some() => None,
            State::Ready => Some((self.heard_at, COMMIT_TIMEOUT, "the source does not say whether it has given the guest up")),
            State::Running => {
                let since = self.waiting_since()?.max(self.heard_at);
                Some((since, PAGE_TIMEOUT, "the source sends none of the pages that the guest waits for"))
            }
            _ => None,
        }
    }

    /// Takes a silence that is too long for a lost link.
    pub(super) fn check_silence(&mut self, now: Duration) {
        if let Some((since, limit, what)) = self.owed()
            && now >= since + limit
        {
            self.pause(&format!("{what}, for {} s by now", limit.as_secs()));
        }
    }

    /// When to poll again if nothing comes.
    pub(super) fn next_look(&self, now: Duration) -> Option<Duration> {
        let may_wait = self.state == State::Running && self.lost.is_none() && !self.missing().is_empty();
        self.deadline.or(self.owed().map(|(since, limit, _)| since + limit)).or(may_wait.then_some(now + LOOK_AGAIN))
    }
}
