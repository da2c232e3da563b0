//! The table at the end of `ferry migrate`.

use std::fmt::Write;

use crate::cli::format::{bytes, microseconds};
use crate::migrate::report::{Mode, Report, Status};

/// What a migration cost, a line to each concern.
pub(super) fn table(report: &Report) -> String {
    let mut table = Table(String::new());
    let status = match report.status {
        Status::Completed => "completed",
        Status::Cancelled => "cancelled",
        _ => "failed",
    };
    let mode = match report.mode {
        Mode::Auto => "auto",
        Mode::Precopy => "precopy",
        Mode::Postcopy => "postcopy",
    };
    let rest = if report.postcopy { ", the rest by postcopy" } else { "" };
    table.row("migration", &format!("{status} after {} (mode {mode}{rest})", microseconds(report.total_us)));
    let downtime = &report.downtime;
    if downtime.total_us > 0 {
        table.row("downtime", &format!("{} (predicted {})", microseconds(downtime.total_us), microseconds(downtime.predicted_us)));
        let parts = [
            ("stop", downtime.stop_us),
            ("device state", downtime.device_state_us),
            ("last sync", downtime.last_sync_us),
            ("transfer", downtime.transfer_us),
            ("load", downtime.load_us),
            ("commit", downtime.commit_us),
            ("resume", downtime.resume_us),
        ];
        for (name, time) in parts {
            table.part(name, &microseconds(time));
        }
    }
    table.row("sent", &bytes(report.bytes.total()));
    let kinds = [
        ("pages", report.bytes.pages),
        ("control", report.bytes.control),
        ("device state", report.bytes.device_state),
        ("dirty bitmaps", report.bytes.bitmaps),
    ];
    for (name, count) in kinds {
        table.part(name, &bytes(count));
    }
    table.row("pages", &format!("{} sent, {} zero", report.normal_pages, report.zero_pages));
    table.row("passes", &report.passes.len().to_string());
    if let Some(faults) = &report.faults {
        table.row("page faults", &format!("{} served by the source, {} at the destination", faults.requested, faults.local));
        let [p50, p99, max] = [faults.p50_us, faults.p99_us, faults.max_us].map(microseconds);
        table.part("latency", &format!("p50 {p50}, p99 {p99}, max {max}"));
    }
    if !report.reason.is_empty() {
        table.row("limit", &report.reason);
    }
    for warning in &report.warnings {
        table.row("warning", warning);
    }
    table.0
}

struct Table(String);

impl Table {
    fn row(&mut self, name: &str, value: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "{name:<16} {value}");
    }

    fn part(&mut self, name: &str, value: &str) {
        self.row(&format!("  {name}"), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::report::{BytesByKind, Downtime, Faults};

    #[test]
    fn table_shows_every_part() {
        let report = Report {
            status: Status::Completed,
            postcopy: true,
            total_us: 1_360_000,
            downtime: Downtime { stop_us: 300, load_us: 5000, total_us: 14_000, predicted_us: 9000, ..Default::default() },
            bytes: BytesByKind { pages: 1 << 20, ..Default::default() },
            faults: Some(Faults { requested: 36, p99_us: 480, ..Default::default() }),
            reason: "another pass would not pay".into(),
            warnings: vec!["the bitmap b of disk d was dropped".into()],
            ..Default::default()
        };
        let table = table(&report);
        for line in [
            "migration        completed after 1.36 s (mode auto, the rest by postcopy)",
            "downtime         14.0 ms (predicted 9.0 ms)",
            "  stop           300 us",
            "  load           5.0 ms",
            "  pages          1.0 MiB",
            "page faults      36 served by the source, 0 at the destination",
            "  latency        p50 0 us, p99 480 us, max 0 us",
            "limit            another pass would not pay",
            "warning          the bitmap b of disk d was dropped",
        ] {
            assert!(table.lines().any(|other| other == line), "{line}\n{table}");
        }
    }
}
