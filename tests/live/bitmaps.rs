//! Dirty bitmaps that go along: compared with what an outside look at the image finds changed.

use serde_json::{Value, json};

use super::ferry::Ferry;
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};

/// The disk's pieces are many more than the guest writes, so that a bitmap with too much set is noticed.
const DISK: u64 = 256 << 20;
const GRANULARITIES: [u64; 2] = [4096, 65536];

fn name(granularity: u64) -> String {
    format!("b{granularity}")
}

fn bitmaps(ferry: &Ferry) -> Vec<Value> {
    ferry.ask("query-block")[0]["inserted"]["dirty-bitmaps"].as_array().unwrap().clone()
}

/// Gives the disk its bitmaps. The guest must be paused, so that a snapshot of the disk is of the same moment.
fn add(ferry: &Ferry) {
    for granularity in GRANULARITIES {
        let arguments = json!({ "node": "root", "name": name(granularity), "granularity": granularity });
        ferry.execute("block-dirty-bitmap-add", arguments).unwrap();
    }
}

#[test]
fn bitmaps_are_exact_after_moves_in_every_mode() {
    let lab = Lab::new();
    let disk = lab.disk(DISK);
    let hardware = Hardware { memory: "256M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=64M rate=20000 disk=on disk_rate=400 heartbeat=50");
    let mut guest = Guest::booting_at(&mut here);
    guest.writes_blocks(100);
    here.ask("stop");
    let before = disk.snapshot();
    add(&here);
    here.ask("cont");
    guest.writes_blocks(100);
    for mode in ["precopy", "postcopy", "auto"] {
        let mut there = lab.receive(Transport::Tcp);
        // Slow enough that the disk is written to while it goes on.
        let options = ["--mode", mode, "--max-bandwidth", "100M", "--postcopy-bandwidth", "100M", "--downtime", "300ms"];
        let (_, report) = lab.migrate(&here, &there.address, &options).succeeds();
        assert!(report.bytes.bitmaps > 0 && report.warnings.is_empty(), "{report:?}");
        here.ends_with(0);
        guest.moved_to(&mut there);
        guest.writes_blocks(100);

        there.ask("stop");
        let now = disk.snapshot();
        let bitmaps = bitmaps(&there);
        assert_eq!(bitmaps.len(), GRANULARITIES.len(), "{bitmaps:?}");
        for granularity in GRANULARITIES {
            let bitmap = bitmaps.iter().find(|bitmap| bitmap["name"] == *name(granularity)).unwrap();
            // Every write of the guest changes what it writes to, so changed and written are the same.
            let expected = now.changed(&before, granularity) as u64 * granularity;
            assert_eq!(bitmap["count"], expected, "after {mode}: {bitmap}");
            assert_eq!((&bitmap["recording"], &bitmap["busy"]), (&true.into(), &false.into()), "{bitmap}");
            assert_eq!(bitmap["granularity"], granularity, "{bitmap}");
        }
        there.ask("cont");
        here = there;
    }
    guest.checks_every_page();
}

#[test]
fn a_bitmap_that_does_not_record_moves_as_it_is() {
    let lab = Lab::new();
    let disk = lab.disk(DISK);
    let hardware = Hardware { memory: "256M", cpus: 1, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=16M rate=1000 disk=on disk_rate=400");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    add(&here);
    guest.writes_blocks(50);
    for granularity in GRANULARITIES {
        here.execute("block-dirty-bitmap-disable", json!({ "node": "root", "name": name(granularity) })).unwrap();
    }
    let counts = |ferry: &Ferry| bitmaps(ferry).iter().map(|bitmap| bitmap["count"].as_u64().unwrap()).collect::<Vec<_>>();
    let frozen = counts(&here);
    assert!(frozen.iter().all(|count| *count > 0));
    let mut there = lab.receive(Transport::Unix);
    lab.migrate(&here, &there.address, &["--mode", "postcopy"]).succeeds();
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.writes_blocks(50);
    assert_eq!(counts(&there), frozen);
    assert!(bitmaps(&there).iter().all(|bitmap| bitmap["recording"] == false));
}

#[test]
fn a_cancelled_migration_leaves_the_bitmaps_recording() {
    let lab = Lab::new();
    let disk = lab.disk(DISK);
    let hardware = Hardware { memory: "256M", cpus: 1, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=32M rate=1000 disk=on disk_rate=400");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    here.ask("stop");
    let before = disk.snapshot();
    add(&here);
    here.ask("cont");
    let mut client = here.client();
    let there = lab.receive(Transport::Tcp);
    let migration = lab.migrate(&here, &there.address, &["--max-bandwidth", "4M"]);
    super::ferry::wait_for_migration(&mut client, "active");
    here.command("cancel");
    migration.fails(&["cancelled"]);
    guest.writes_blocks(50);
    here.ask("stop");
    let now = disk.snapshot();
    for (bitmap, granularity) in bitmaps(&here).iter().zip(GRANULARITIES) {
        assert_eq!(bitmap["count"], now.changed(&before, granularity) as u64 * granularity, "{bitmap}");
        assert_eq!((&bitmap["recording"], &bitmap["busy"]), (&true.into(), &false.into()), "{bitmap}");
    }
}

#[test]
fn chosen_bitmaps_go_under_aliases_and_what_is_not_expected_is_told_of() {
    let lab = Lab::new();
    let disk = lab.disk(DISK);
    let hardware = Hardware { memory: "256M", cpus: 1, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=16M rate=1000 disk=on disk_rate=400");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    add(&here);
    here.execute("block-dirty-bitmap-add", json!({ "node": "root", "name": "stays" })).unwrap();
    guest.writes_blocks(50);
    here.ask("stop");
    let mapped = |bitmap: u64| bitmaps(&here).into_iter().find(|info| info["name"] == *name(bitmap)).unwrap()["count"].clone();
    let count = mapped(4096);
    let alias = |name: &str, alias: &str| json!({ "name": name, "alias": alias });
    let node = |bitmaps: Vec<Value>| json!({ "block-bitmap-mapping": [{ "node-name": "root", "alias": "r", "bitmaps": bitmaps }] });
    here.execute("migrate-set-parameters", node(vec![alias("b4096", "x"), alias("b65536", "y")])).unwrap();
    let twice = here.execute("migrate-set-parameters", node(vec![alias("b4096", "x"), alias("b65536", "x")])).unwrap_err().to_string();
    assert!(twice.contains("'x' is used twice"), "{twice}");
    let mut there = lab.receive(Transport::Unix);
    there.execute("migrate-set-parameters", node(vec![alias("arrived", "x")])).unwrap();
    let (_, report) = lab.migrate(&here, &there.address, &["--mode", "postcopy"]).succeeds();
    assert!(report.warnings.iter().any(|warning| warning.contains("the alias 'y'")), "{:?}", report.warnings);
    here.ends_with(0);
    guest.moved_to(&mut there);
    let arrived = bitmaps(&there);
    assert_eq!(arrived.len(), 1, "{arrived:?}");
    assert_eq!((&arrived[0]["name"], &arrived[0]["count"]), (&"arrived".into(), &count), "{arrived:?}");
}
