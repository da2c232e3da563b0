//! The table at the end of `ferry migrate`.

use std::fmt::Write;

use crate::cli::format::{bytes, microseconds};
use crate::migrate::report::{Forecast, Mode, Report, Status};

/// What a migration cost, a line to each concern.
pub(super) fn table(report: &Report) -> String {
    let mut table = Table(String::new());
    if !report.forecasts.is_empty() {
        table.row("dry run", &report.reason);
        for forecast in &report.forecasts {
            table.row(&format!("  {}", word(forecast.mode)), &outlook(forecast));
        }
        return table.0;
    }
    let status = match report.status {
        Status::Completed => "completed",
        Status::Cancelled => "cancelled",
        _ => "failed",
    };
    let mode = word(report.mode);
    let rest = if report.postcopy { ", the rest by postcopy" } else { "" };
    table.row("migration", &format!("{status} after {} (mode {mode}{rest})", microseconds(report.total_us)));
    let downtime = &report.downtime;
    if downtime.total_us > 0 {
        let apart = if downtime.pre_switchover_us > 0 { " beside pre-switchover" } else { "" };
        let predicted = microseconds(downtime.predicted_us);
        table.row("downtime", &format!("{} (predicted {predicted}{apart})", microseconds(downtime.total_us)));
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
            if name == "last sync" && downtime.pre_switchover_us > 0 {
                table.part("pre-switchover", &format!("{}, waiting for `ferry continue`", microseconds(downtime.pre_switchover_us)));
            }
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
    if report.normal_blocks + report.zero_blocks > 0 {
        table.part("disks", &bytes(report.bytes.blocks));
        table.row("blocks", &format!("{} sent, {} zero", report.normal_blocks, report.zero_blocks));
    }
    table.row("pages", &format!("{} sent, {} zero", report.normal_pages, report.zero_pages));
    if report.compressed_pages > 0 {
        table.part("compressed", &format!("{}, which saved {}", report.compressed_pages, bytes(report.compression_saved)));
    }
    table.row("passes", &report.passes.len().to_string());
    if report.recoveries > 0 {
        table.row("recoveries", &report.recoveries.to_string());
    }
    if let Some(faults) = &report.faults {
        table.row("page faults", &format!("{} served by the source, {} at the destination", faults.requested, faults.local));
        let [p50, p99, max] = [faults.p50_us, faults.p99_us, faults.max_us].map(microseconds);
        table.part("latency", &format!("p50 {p50}, p99 {p99}, max {max}"));
        table.part("prefetched", &format!("{} pages: {} used, {} not", faults.prefetched, faults.prefetch_used, faults.prefetch_unused()));
        let vcpus: Vec<_> = faults.vcpu_blocktime_us.iter().map(|time| microseconds(*time)).collect();
        table.part("blocktime", &format!("all vCPUs {}, each {}", microseconds(faults.blocktime_us), vcpus.join(", ")));
    }
    if let Some(waits) = report.block_waits.as_ref().filter(|waits| waits.waited > 0) {
        let [p50, p99, max] = [waits.p50_us, waits.p99_us, waits.max_us].map(microseconds);
        table.row("disk waits", &format!("{} blocks: p50 {p50}, p99 {p99}, max {max}", waits.waited));
    }
    if !report.reason.is_empty() {
        table.row("limit", &report.reason);
    }
    for image in &report.stale_images {
        table.row("stale", &format!("{image}: the guest writes to its copy at the destination"));
    }
    for warning in &report.warnings {
        table.row("warning", warning);
    }
    table.0
}

fn word(mode: Mode) -> &'static str {
    match mode {
        Mode::Auto => "auto",
        Mode::Precopy => "precopy",
        Mode::Postcopy => "postcopy",
    }
}

/// How a migration would go in one mode.
fn outlook(forecast: &Forecast) -> String {
    let Forecast { ends, postcopy, passes, total_us, downtime_us, throttle, reason, .. } = forecast;
    if !ends {
        return format!("would not end: {reason}");
    }
    let passes = match passes {
        0 => String::new(),
        1 => ", 1 pass".into(),
        _ => format!(", {passes} passes"),
    };
    let rest = if *postcopy { ", the rest by postcopy" } else { "" };
    let slowed = if *throttle > 0 { format!(", vCPUs standing still {throttle} % of the time") } else { String::new() };
    format!("{}, downtime {}{passes}{rest}{slowed}", microseconds(*total_us), microseconds(*downtime_us))
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
    fn a_dry_run_tells_of_each_mode() {
        let auto = Forecast { ends: true, postcopy: true, passes: 2, total_us: 3_200_000, downtime_us: 5000, ..Default::default() };
        let precopy = Forecast { mode: Mode::Precopy, reason: "the guest is too fast".into(), ..Default::default() };
        let report = Report { forecasts: vec![auto, precopy], reason: "nothing was moved".into(), ..Default::default() };
        let expected = "dry run          nothing was moved\n  \
                        auto           3.20 s, downtime 5.0 ms, 2 passes, the rest by postcopy\n  \
                        precopy        would not end: the guest is too fast\n";
        assert_eq!(table(&report), expected);
    }

    #[test]
    fn table_shows_every_part() {
        let report = Report {
            status: Status::Completed,
            postcopy: true,
            total_us: 1_360_000,
            downtime: Downtime { stop_us: 300, load_us: 5000, total_us: 14_000, predicted_us: 9000, ..Default::default() },
            bytes: BytesByKind { pages: 1 << 20, ..Default::default() },
            faults: Some(Faults {
                requested: 36,
                p99_us: 480,
                prefetched: 128,
                prefetch_used: 100,
                blocktime_us: 70,
                vcpu_blocktime_us: vec![900, 1000],
                ..Default::default()
            }),
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
            "  prefetched     128 pages: 100 used, 28 not",
            "  blocktime      all vCPUs 70 us, each 900 us, 1.0 ms",
            "limit            another pass would not pay",
            "warning          the bitmap b of disk d was dropped",
        ] {
            assert!(table.lines().any(|other| other == line), "{line}\n{table}");
        }
    }

    #[test]
    fn a_wait_for_a_person_is_a_part_of_the_blackout_that_nobody_predicted() {
        let mut report = Report {
            downtime: Downtime { last_sync_us: 7, total_us: 61_000_000, predicted_us: 9000, ..Default::default() },
            ..Default::default()
        };
        assert!(!table(&report).contains("pre-switchover"));
        report.downtime.pre_switchover_us = 60_990_000;
        let expected = "  last sync      7 us\n  pre-switchover 60.99 s, waiting for `ferry continue`\n  transfer";
        let table = table(&report);
        assert!(table.contains(expected) && table.contains("(predicted 9.0 ms beside pre-switchover)"), "{table}");
    }
}
