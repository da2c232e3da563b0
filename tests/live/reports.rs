//! What `ferry migrate` tells.

use serde_json::Value;

use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::proxy::Proxy;
use ferry::migrate::report::{Mode, Report, Status};

/// What the guest has written to; pages that nobody ever touched need not be named.
const FILLED_PAGES: u64 = (64 << 20) / 4096;

fn check_accounts(report: &Report) {
    assert_eq!((report.status, &report.error), (Status::Completed, &None), "{report:?}");
    assert!(report.warnings.is_empty(), "{report:?}");
    assert!(!report.reason.is_empty(), "{report:?}");
    assert_eq!(report.bytes.pages + report.compression_saved, report.normal_pages * 4096, "{report:?}");
    assert!(report.bytes.control > 0 && report.bytes.device_state > 0, "{report:?}");
    assert!(report.normal_pages >= FILLED_PAGES, "not every page went: {report:?}");
    let downtime = &report.downtime;
    let parts = downtime.stop_us + downtime.device_state_us + downtime.last_sync_us + downtime.transfer_us + downtime.load_us;
    assert!(parts + downtime.commit_us + downtime.resume_us <= downtime.total_us, "{downtime:?}");
    assert!(downtime.total_us < report.total_us, "{report:?}");
    assert!(report.passes.iter().zip(1..).all(|(pass, number)| pass.number == number && !pass.decision.is_empty()), "{report:?}");
}

fn statuses(events: &[Value]) -> Vec<&str> {
    events.iter().filter(|event| event["event"] == "MIGRATION").map(|event| event["data"]["status"].as_str().unwrap()).collect()
}

#[test]
fn events_table_and_report_agree() {
    let lab = Lab::new();
    let mut here = lab.run(&Hardware { memory: "256M", cpus: 2, ..Hardware::default() }, "fill=64M rate=5000");
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    for mode in [Mode::Precopy, Mode::Postcopy, Mode::Auto] {
        let word = serde_json::to_value(mode).unwrap();
        let mut there = lab.receive(Transport::Tcp);
        let link = Proxy::recording(&there.address);
        let options = ["--mode", word.as_str().unwrap(), "--channels", "2", "--compression", "lz4"];
        let (ended, report) = lab.migrate(&here, &link.address, &options).succeeds();
        here.ends_with(0);
        check_accounts(&report);
        let on_the_wire: u64 = link.recorded().iter().map(|[to_destination, _]| to_destination.len() as u64).sum();
        // The last words come after the report, and so may answers to requests that other pages have met on their way.
        let uncounted = on_the_wire - report.bytes.total();
        assert!(uncounted < if report.postcopy { 1 << 20 } else { 1000 }, "{on_the_wire} bytes went: {report:?}");
        assert_eq!(report.mode, mode);

        let statuses = statuses(&ended.events);
        assert_eq!(statuses.first(), Some(&"setup"), "{statuses:?}");
        assert_eq!(statuses.last(), Some(&"completed"), "{statuses:?}");
        assert_eq!(statuses.iter().filter(|status| **status == "completed").count(), 1, "{statuses:?}");
        assert_eq!(statuses.contains(&"postcopy-active"), report.postcopy, "{statuses:?}");
        let last = &ended.events.iter().rfind(|event| event["event"] == "MIGRATION").unwrap()["data"]["report"];
        assert_eq!(serde_json::from_value::<Report>(last.clone()).unwrap(), report, "the event has another report than the file");
        let passes = ended.events.iter().filter(|event| event["event"] == "MIGRATION_PASS").count();
        assert_eq!(passes, report.passes.len(), "{:?}", ended.events);

        for name in ["migration", "downtime", "  stop", "  load", "  commit", "  resume", "sent", "pages", "passes", "limit"] {
            assert!(ended.said.lines().any(|line| line.starts_with(name)), "the table has no {name}:\n{}", ended.said);
        }
        let faults = ended.said.lines().any(|line| line.starts_with("page faults"));
        assert_eq!((faults, report.faults.is_some()), (report.postcopy, report.postcopy), "{}", ended.said);
        match mode {
            Mode::Precopy => assert!(!report.postcopy && !report.passes.is_empty(), "{report:?}"),
            Mode::Postcopy => {
                let faults = report.faults.as_ref().unwrap();
                assert!(report.postcopy && faults.requested > 0, "{report:?}");
                assert!(faults.p50_us > 0 && faults.p50_us <= faults.p99_us && faults.p99_us <= faults.max_us, "{faults:?}");
            }
            Mode::Auto => {}
        }
        guest.moved_to(&mut there);
        guest.checks_every_page();
        here = there;
    }
}
