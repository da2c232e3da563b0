//! What is shown while a migration goes on: a bar on a terminal, otherwise a JSON line per event.

use std::cell::RefCell;
use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value};

use crate::cli::format;
use crate::memory::PAGE_SIZE;
use crate::migrate::report::Progress;

/// Standard output, as far as a migration writes to it.
pub(super) enum Display {
    /// A person watches.
    Terminal {
        bar: ProgressBar,
        /// What was decided last; each decision is shown once.
        decision: RefCell<String>,
    },
    /// A program reads.
    Lines,
}

impl Display {
    pub fn new() -> Self {
        if !std::io::stdout().is_terminal() {
            return Display::Lines;
        }
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stdout());
        if let Ok(style) = ProgressStyle::with_template("{bar:12} {wide_msg}") {
            bar.set_style(style);
        }
        Display::Terminal { bar, decision: RefCell::default() }
    }

    pub fn event(&self, event: &Map<String, Value>) {
        if let Display::Lines = self
            && let Ok(line) = serde_json::to_string(event)
        {
            // A reader that has gone away does not end the migration.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }

    pub fn progress(&self, progress: &Progress) {
        if let Display::Terminal { bar, decision } = self {
            if decision.replace(progress.reason.clone()) != progress.reason {
                bar.println(&progress.reason);
            }
            bar.update(|bar| {
                let total = progress.ram_total + progress.disk_total;
                bar.set_len(total);
                bar.set_pos(total.saturating_sub(remaining(progress)));
            });
            bar.set_message(message(progress));
        }
    }

    /// A remark beside the progress.
    pub fn note(&self, text: &str) {
        match self {
            Display::Terminal { bar, .. } => bar.println(text),
            Display::Lines => eprintln!("{text}"),
        }
    }

    pub fn finish(&self) {
        if let Display::Terminal { bar, .. } = self {
            bar.finish_and_clear();
        }
    }

    /// The table at the end; beside the JSON lines rather than between them.
    pub fn table(&self, table: &str) {
        match self {
            Display::Terminal { .. } => print!("{table}"),
            Display::Lines => eprint!("{table}"),
        }
    }
}

fn remaining(progress: &Progress) -> u64 {
    progress.ram_remaining.saturating_add(progress.disk_remaining)
}

fn message(progress: &Progress) -> String {
    let status = serde_json::to_value(progress.status).ok();
    let mut parts = vec![status.as_ref().and_then(Value::as_str).unwrap_or_default().to_string()];
    if progress.pass > 0 {
        parts.push(format!("pass {}", progress.pass));
    }
    parts.push(format!("{} left at {}/s", format::bytes(remaining(progress)), format::bytes(progress.bandwidth)));
    if progress.dirty_pages_rate > 0 {
        parts.push(format!("dirtying {}/s", format::bytes(progress.dirty_pages_rate.saturating_mul(PAGE_SIZE as u64))));
    }
    if let Some(seconds) = remaining(progress).checked_div(progress.bandwidth) {
        parts.push(format!("{seconds} s to go"));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::report::Status;

    #[test]
    fn message_leaves_out_what_is_not_known() {
        let mut progress = Progress { status: Status::Setup, ..Default::default() };
        assert_eq!(message(&progress), "setup, 0 B left at 0 B/s");
        progress =
            Progress { status: Status::Active, pass: 2, ram_remaining: 10 << 20, bandwidth: 5 << 20, dirty_pages_rate: 256, ..progress };
        assert_eq!(message(&progress), "active, pass 2, 10.0 MiB left at 5.0 MiB/s, dirtying 1.0 MiB/s, 2 s to go");
    }
}
