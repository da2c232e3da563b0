//! `ferry migrate`, as a user calls it.

use std::path::PathBuf;
use std::time::Duration;

use ferry::migrate::report::Report;
use rustix::process::Signal;
use serde_json::Value;

use super::output::LIMIT;
use super::process::{End, Process};

/// A `ferry migrate` under way.
pub struct Migration {
    pub process: Process,
    pub report: PathBuf,
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    pub end: End,
    /// The JSON lines.
    pub events: Vec<Value>,
    /// Notes, the table, and why it failed.
    pub said: String,
    pub report: Option<Report>,
}

impl Migration {
    /// Ctrl-C.
    pub fn interrupt(&self) {
        self.process.signal(Signal::INT);
    }

    /// Whether it ends within `time`, for those who act at some moment of it.
    pub fn ends_within(&mut self, time: Duration) -> bool {
        self.process.ends_within(time).is_some()
    }

    pub fn end(mut self) -> Ended {
        let lines = self.process.stdout.take().unwrap().text_to_end();
        let said = self.process.stderr.text_to_end();
        let end = self.process.ends_within(LIMIT).unwrap();
        let events = lines.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?}: {error}"))).collect();
        let report = std::fs::read(&self.report).ok().map(|bytes| serde_json::from_slice(&bytes).unwrap());
        Ended { end, events, said, report }
    }

    /// It must succeed.
    pub fn succeeds(self) -> (Ended, Report) {
        let mut ended = self.end();
        assert_eq!(ended.end, End::Status(0), "{}", ended.said);
        let report = ended.report.take().expect("a report");
        (ended, report)
    }

    /// It must fail, in one sentence that has all `words`.
    pub fn fails(self, words: &[&str]) -> Ended {
        let ended = self.end();
        assert_eq!(ended.end, End::Status(1), "{}", ended.said);
        let sentence =
            ended.said.lines().find(|line| line.starts_with("ferry: ")).unwrap_or_else(|| panic!("no sentence:\n{}", ended.said));
        for word in words {
            assert!(sentence.contains(word), "{word:?} is not said: {sentence}");
        }
        ended
    }
}
