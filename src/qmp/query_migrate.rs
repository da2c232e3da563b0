//! The answer to `query-migrate`, in QEMU's shape, with all that Ferry knows beside it.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::memory::PAGE_SIZE;
use crate::migrate::report::{Progress, Report, Status};

/// The member `ferry` of the answer: more than QEMU has names for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Details {
    /// While the migration goes on.
    Progress(Progress),
    /// When it has ended.
    Report(Report),
}

/// The answer to `query-migrate`: of the migration that goes on, or of the last one if there is a `report`. Empty, as in QEMU, when
/// there was none.
pub fn query_migrate(progress: &Progress, report: Option<&Report>) -> Value {
    let status = report.map_or(progress.status, |report| report.status);
    if status == Status::None {
        return json!({});
    }
    let total_ms = report.map_or(progress.total_time_ms, |report| report.total_us / 1000);
    let bytes = report.map_or(progress.bytes, |report| report.bytes);
    let normal = report.map_or(progress.normal_pages, |report| report.normal_pages);
    let bandwidth = match report {
        Some(_) => bytes.total().saturating_mul(1000) / total_ms.max(1),
        None => progress.bandwidth,
    };
    let mut answer = json!({
        "status": status,
        "total-time": total_ms,
        "setup-time": progress.setup_time_ms,
        "ram": {
            "transferred": bytes.total(),
            "remaining": if status == Status::Completed { 0 } else { progress.ram_remaining },
            "total": progress.ram_total,
            "duplicate": report.map_or(progress.zero_pages, |report| report.zero_pages),
            "normal": normal,
            "normal-bytes": normal.saturating_mul(PAGE_SIZE as u64),
            "dirty-pages-rate": progress.dirty_pages_rate,
            "mbps": bandwidth as f64 * 8.0 / 1e6,
            "dirty-sync-count": report.map_or(progress.pass as usize, |report| report.passes.len()),
            "postcopy-requests": report.and_then(|report| report.faults.as_ref()).map_or(progress.postcopy_requests, |faults| faults.requested),
            "page-size": PAGE_SIZE,
        },
        "ferry": report.map_or_else(|| Details::Progress(progress.clone()), |report| Details::Report(report.clone())),
    });
    // In the shape that it had in QEMU while block migration was part of that.
    if progress.disk_total > 0 {
        answer["disk"] = json!({
            "total": progress.disk_total,
            "remaining": if status == Status::Completed { 0 } else { progress.disk_remaining },
            "transferred": bytes.blocks,
        });
    }
    // QEMU's destination has them (qapi/migration.json, since 3.0 and 10.1); here the source has them, too, once it was told.
    if let Some(faults) = report.map_or(&progress.faults, |report| &report.faults) {
        answer["postcopy-blocktime"] = milliseconds(faults.blocktime_us).into();
        answer["postcopy-vcpu-blocktime"] = faults.vcpu_blocktime_us.iter().map(|time| milliseconds(*time)).collect();
        answer["postcopy-latency"] = faults.latency_ns.into();
        answer["postcopy-latency-dist"] = faults.latency_dist.iter().copied().collect();
        answer["postcopy-vcpu-latency"] = faults.vcpu_latency_ns.iter().copied().collect();
        answer["postcopy-non-vcpu-latency"] = faults.non_vcpu_latency_ns.into();
    }
    match report {
        // Rounded up: a short blackout is not none.
        Some(report) => answer["downtime"] = report.downtime.total_us.div_ceil(1000).into(),
        None => answer["expected-downtime"] = progress.expected_downtime_ms.into(),
    }
    // As in QEMU only while it is so.
    if report.is_none() && progress.throttle > 0 {
        answer["cpu-throttle-percentage"] = progress.throttle.into();
    }
    if let Some(error) = report.map_or(&progress.error, |report| &report.error) {
        answer["error-desc"] = error.as_str().into();
    }
    answer
}

/// As wide as QEMU's type.
fn milliseconds(microseconds: u64) -> u32 {
    u32::try_from(microseconds / 1000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::report::{BytesByKind, Downtime, Faults};

    #[test]
    fn running_migration_has_the_keys_that_qemu_s_users_read() {
        let progress = Progress {
            status: Status::PostcopyActive,
            bandwidth: 125_000_000,
            normal_pages: 2,
            bytes: BytesByKind { pages: 8192, ..Default::default() },
            ..Default::default()
        };
        let answer = query_migrate(&progress, None);
        assert_eq!(answer["status"], "postcopy-active");
        assert_eq!(answer.get("cpu-throttle-percentage"), None);
        let throttled = query_migrate(&Progress { throttle: 30, ..progress.clone() }, None);
        assert_eq!(throttled["cpu-throttle-percentage"], 30);
        assert_eq!(answer["expected-downtime"], 0);
        assert_eq!(answer["ram"]["mbps"], 1000.0);
        assert_eq!(answer["ram"]["normal-bytes"], 8192);
        assert_eq!(answer.get("downtime").or(answer.get("error-desc")), None);
        assert_eq!(serde_json::from_value::<Details>(answer["ferry"].clone()).unwrap(), Details::Progress(progress));
    }

    #[test]
    fn postcopy_s_waits_have_qemu_s_keys() {
        let faults = Faults {
            blocktime_us: 1999,
            vcpu_blocktime_us: vec![2000, u64::MAX],
            latency_ns: 5,
            latency_dist: vec![0, 7],
            vcpu_latency_ns: vec![6, 0],
            non_vcpu_latency_ns: 8,
            ..Faults::default()
        };
        let progress = Progress { status: Status::PostcopyActive, faults: Some(faults), ..Progress::default() };
        let answer = query_migrate(&progress, None);
        let values = [
            ("postcopy-blocktime", json!(1)),
            ("postcopy-vcpu-blocktime", json!([2, u32::MAX])),
            ("postcopy-latency", json!(5)),
            ("postcopy-latency-dist", json!([0, 7])),
            ("postcopy-vcpu-latency", json!([6, 0])),
            ("postcopy-non-vcpu-latency", json!(8)),
        ];
        for (key, value) in values {
            assert_eq!(answer[key], value, "{key}");
        }
        assert_eq!(query_migrate(&Progress { faults: None, ..progress }, None).get("postcopy-blocktime"), None);
    }

    #[test]
    fn ended_migration_carries_the_report() {
        let report = Report {
            status: Status::Failed,
            total_us: 2_000_000,
            downtime: Downtime { total_us: 1, ..Default::default() },
            error: Some("the destination went away".into()),
            ..Default::default()
        };
        let answer = query_migrate(&Progress { ram_remaining: 5, ..Default::default() }, Some(&report));
        assert_eq!(answer["status"], "failed");
        assert_eq!((&answer["total-time"], &answer["downtime"]), (&json!(2000), &json!(1)));
        assert_eq!(answer["error-desc"], "the destination went away");
        assert_eq!(answer["ram"]["remaining"], 5);
        assert_eq!(serde_json::from_value::<Details>(answer["ferry"].clone()).unwrap(), Details::Report(report));
    }

    #[test]
    fn before_any_migration_there_is_nothing() {
        assert_eq!(query_migrate(&Progress::default(), None), json!({}));
    }
}
