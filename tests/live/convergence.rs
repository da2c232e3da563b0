//! Guests that dirty memory faster than it is sent, and what a dry run says beforehand.

use ferry::migrate::report::{Mode, Status};
use serde_json::json;

use super::ferry::{execute, wait_for_migration, wait_until};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};

const HARDWARE: Hardware = Hardware { memory: "256M", cpus: 1, disk: None, readonly: false };
/// Dirties 16 MiB over and over, faster than 50 MB/s carry them.
const FAST: &str = "fill=16M rate=max order=random";
const LIMITED: [&str; 4] = ["--max-bandwidth", "50M", "--downtime", "100ms"];

#[test]
fn precopy_says_why_it_cannot_end_and_auto_converge_ends_it() {
    let lab = Lab::new();
    let mut here = lab.run(&HARDWARE, FAST);
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    let mut there = lab.receive(Transport::Tcp);
    // What loopback carries in the switch is far more than the limit of the passes, and would end it.
    let parameters = json!({ "avail-switchover-bandwidth": 50_000_000, "cpu-throttle-initial": 50, "cpu-throttle-increment": 49 });
    here.execute("migrate-set-parameters", parameters).unwrap();
    let mut client = here.client();
    let migration = lab.migrate(&here, &there.address, &[&["--mode", "precopy"], &LIMITED[..]].concat());
    wait_until(&mut client, "the reason", |client| {
        let answer = execute(client, "query-migrate", json!({})).unwrap();
        assert_eq!(answer.get("cpu-throttle-percentage"), None, "{answer}");
        let reason = answer["ferry"]["progress"]["reason"].as_str().unwrap_or_default();
        reason.contains("the guest dirties") && reason.ends_with("so precopy cannot end within the limit")
    });
    let status = here.command("status");
    assert!(status.contains("decision   pass") && status.contains("the link carries"), "{status}");

    let capabilities = json!({ "capabilities": [{ "capability": "auto-converge", "state": true }] });
    here.execute("migrate-set-capabilities", capabilities).unwrap();
    wait_until(&mut client, "the throttle", |client| {
        execute(client, "query-migrate", json!({})).unwrap()["cpu-throttle-percentage"].as_u64() == Some(50)
    });
    let (_, report) = migration.succeeds();
    here.ends_with(0);
    assert!(!report.postcopy && report.passes.iter().any(|pass| pass.throttle >= 50), "{report:?}");
    assert!(report.downtime.predicted_us > 0 && report.downtime.predicted_us <= 100_000, "{report:?}");
    guest.moved_to(&mut there);
    guest.checks_every_page();
}

#[test]
fn a_guest_that_was_slowed_down_in_vain_is_as_fast_as_before() {
    let lab = Lab::new();
    let mut here = lab.run(&HARDWARE, FAST);
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    here.execute("migrate-set-parameters", json!({ "avail-switchover-bandwidth": 1_000_000, "max-cpu-throttle": 20 })).unwrap();
    let mut there = lab.receive(Transport::Unix);
    let mut client = here.client();
    let migration = lab.migrate(&here, &there.address, &[&["--mode", "precopy", "--auto-converge"], &LIMITED[..]].concat());
    wait_until(&mut client, "the throttle", |client| {
        execute(client, "query-migrate", json!({})).unwrap()["cpu-throttle-percentage"].as_u64() == Some(20)
    });
    here.command("cancel");
    migration.fails(&["the migration was cancelled"]);
    there.ends_with(1);
    let threads = std::fs::read_dir(format!("/proc/{}/task", here.process.id())).unwrap();
    let names: Vec<_> = threads.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap()).collect();
    assert!(names.iter().any(|name| name.trim() == "vcpu0") && !names.iter().any(|name| name.trim() == "throttle"), "{names:?}");
    guest.checks_every_page();
}

#[test]
fn a_dry_run_tells_of_each_mode_and_moves_nothing() {
    let lab = Lab::new();
    let mut here = lab.run(&HARDWARE, FAST);
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    for transport in [Transport::Unix, Transport::Tcp] {
        let mut there = lab.receive(transport);
        here.execute("migrate-set-parameters", json!({ "avail-switchover-bandwidth": 50_000_000 })).unwrap();
        for _ in 0..2 {
            let options = [&["--dry-run"], &LIMITED[..]].concat();
            let (ended, report) = lab.migrate(&here, &there.address, &options).succeeds();
            assert_eq!((report.status, report.error), (Status::Cancelled, None));
            let modes: Vec<_> = report.forecasts.iter().map(|forecast| (forecast.mode, forecast.ends)).collect();
            assert_eq!(modes, [(Mode::Auto, true), (Mode::Precopy, false), (Mode::Postcopy, true)], "{:?}", report.forecasts);
            for line in ["dry run", "  auto", "  precopy        would not end", "  postcopy"] {
                assert!(ended.said.lines().any(|said| said.starts_with(line)), "{line:?} is missing:\n{}", ended.said);
            }
            assert_eq!((here.state().as_str(), there.state().as_str()), ("running", "inmigrate"));
            guest.beats(3);
        }
        // The same `receive` takes the guest.
        lab.migrate(&here, &there.address, &["--mode", "auto"]).succeeds();
        here.ends_with(0);
        guest.moved_to(&mut there);
        guest.checks_every_page();
        here = there;
    }
}

#[test]
fn a_dry_run_hears_every_refusal_and_can_be_cancelled() {
    let lab = Lab::new();
    let mut here = lab.run(&HARDWARE, FAST);
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    let absent = format!("id=root,path={}", lab.path("absent").display());
    let mut there = lab.receive_with(Transport::Tcp, &["--disk", &absent]);
    lab.migrate(&here, &there.address, &["--dry-run"]).fails(&["the destination says", "the guest has none"]);
    there.ends_with(1);

    let mut there = lab.receive(Transport::Tcp);
    let mut client = here.client();
    let migration = lab.migrate(&here, &there.address, &["--dry-run"]);
    wait_for_migration(&mut client, "active");
    assert!(here.command_fails("start-postcopy").contains("dry run"));
    here.command("cancel");
    migration.fails(&["the migration was cancelled"]);
    there.ends_with(1);
    guest.beats(3);
}
