//! What is shown while a backup is taken or restored: a bar on a terminal, otherwise a JSON line per event.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};
use serde_json::{Value, json};

/// How often a program that reads is told of the progress.
const INTERVAL: Duration = Duration::from_secs(1);

/// Standard output, as far as a backup writes to it.
pub(super) enum Display {
    /// A person watches.
    Terminal(ProgressBar),
    /// A program reads; it was last told of the progress at this time.
    Lines(Instant),
}

impl Display {
    pub fn new() -> Self {
        if !std::io::stdout().is_terminal() {
            return Display::Lines(Instant::now());
        }
        // An error is said on a line of its own.
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stdout()).with_finish(ProgressFinish::AndClear);
        if let Ok(style) = ProgressStyle::with_template("{bar:12} {percent} % {wide_msg}") {
            bar.set_style(style);
        }
        Display::Terminal(bar)
    }

    pub fn event(&self, event: &Value) {
        if let Display::Lines(_) = self {
            // A reader that has gone away does not end the backup.
            let _ = writeln!(std::io::stdout(), "{event}");
        }
    }

    /// `at` of `total` bytes have been looked at.
    pub fn progress(&mut self, at: u64, total: u64, doing: &str) {
        match self {
            Display::Terminal(bar) => {
                bar.update(|bar| {
                    bar.set_len(total);
                    bar.set_pos(at);
                });
                bar.set_message(doing.to_owned());
            }
            Display::Lines(last) if last.elapsed() >= INTERVAL => {
                *last = Instant::now();
                self.event(&json!({ "event": "PROGRESS", "data": { "offset": at, "size": total } }));
            }
            Display::Lines(_) => {}
        }
    }

    /// A remark beside the progress.
    pub fn note(&self, text: &str) {
        match self {
            Display::Terminal(bar) => bar.println(text),
            Display::Lines(_) => eprintln!("{text}"),
        }
    }

    /// How it ended, for a program and for a person.
    pub fn end(&self, event: &Value, text: &str) {
        self.event(event);
        match self {
            Display::Terminal(bar) => {
                bar.finish_and_clear();
                println!("{text}");
            }
            Display::Lines(_) => eprintln!("{text}"),
        }
    }
}
