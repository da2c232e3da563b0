//! Many dirty bitmaps of all kinds at once, as in QEMU's test of their postcopy (its iotest 199): bit by bit what an outside look at the image
//! finds changed, at the destination, after its shutdown, and where the source dies before they have all come.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::disk::{Snapshot, TestDisk};
use super::ferry::{Ferry, wait_until};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};

const DISK: u64 = 64 << 20;
const COUNT: usize = 15;
const GRANULARITIES: [u64; 3] = [512, 4096, 65536];
const WRITING: &str = "fill=16M rate=1000 disk=on disk_rate=400";

fn hardware(disk: &TestDisk) -> Hardware<'_> {
    Hardware { memory: "256M", cpus: 1, disk: Some(disk), ..Hardware::default() }
}

fn granularity(number: usize) -> u64 {
    GRANULARITIES[number % 3]
}

fn is_persistent(number: usize) -> bool {
    number.is_multiple_of(2)
}

/// These stop recording when the guest has written something.
fn is_disabled(number: usize) -> bool {
    number % 5 == 1
}

fn bitmap(number: usize) -> Value {
    json!({ "node": "root", "name": format!("b{number}") })
}

fn sha256(ferry: &Ferry, number: usize) -> String {
    ferry.execute("x-debug-block-dirty-bitmap-sha256", bitmap(number)).unwrap()["sha256"].as_str().unwrap().into()
}

/// What `query-block` says of each bitmap.
fn bitmaps(ferry: &Ferry) -> BTreeMap<String, Value> {
    let list = ferry.ask("query-block")[0]["inserted"]["dirty-bitmaps"].clone();
    list.as_array().into_iter().flatten().map(|bitmap| (bitmap["name"].as_str().unwrap().to_owned(), bitmap.clone())).collect()
}

/// Boots a guest that writes, and gives its disk all bitmaps at one moment; returns what was on the disk then.
fn with_bitmaps(lab: &Lab, disk: &TestDisk) -> (Ferry, Guest, Snapshot) {
    let mut ferry = lab.run(&hardware(disk), WRITING);
    let mut guest = Guest::booting_at(&mut ferry);
    guest.beats(1);
    ferry.ask("stop");
    let before = disk.snapshot();
    let add = |number: usize| {
        let mut data = bitmap(number);
        data["granularity"] = granularity(number).into();
        data["persistent"] = is_persistent(number).into();
        json!({ "type": "block-dirty-bitmap-add", "data": data })
    };
    ferry.execute("transaction", json!({ "actions": (0..COUNT).map(add).collect::<Vec<_>>() })).unwrap();
    ferry.ask("cont");
    guest.writes_blocks(100);
    (ferry, guest, before)
}

#[test]
fn bitmaps_of_all_kinds_arrive_bit_by_bit_and_outlive_the_guest() {
    let lab = Lab::new();
    for mode in ["precopy", "postcopy"] {
        let disk = lab.disk(DISK);
        let (mut here, mut guest, before) = with_bitmaps(&lab, &disk);
        here.ask("stop");
        let middle = disk.snapshot();
        (0..COUNT).filter(|number| is_disabled(*number)).for_each(|number| {
            here.execute("block-dirty-bitmap-disable", bitmap(number)).unwrap();
        });
        here.ask("cont");
        guest.writes_blocks(50);

        let mut there = lab.receive(Transport::Tcp);
        // Slow enough that the guest writes at the destination while bitmaps are on their way.
        let options = ["--mode", mode, "--downtime", "500ms", "--postcopy-bandwidth", "20M"];
        let (_, report) = lab.migrate(&here, &there.address, &options).succeeds();
        assert!(report.warnings.is_empty(), "{:?}", report.warnings);
        here.ends_with(0);
        guest.moved_to(&mut there);
        guest.writes_blocks(50);
        there.ask("stop");
        let now = disk.snapshot();
        let expected: Vec<String> =
            (0..COUNT).map(|number| if is_disabled(number) { &middle } else { &now }.bitmap_sha256(&before, granularity(number))).collect();
        let known = bitmaps(&there);
        for (number, expected) in expected.iter().enumerate() {
            let info = &known[&format!("b{number}")];
            assert_eq!(sha256(&there, number), *expected, "{mode}: {info}");
            assert_eq!(info["recording"], !is_disabled(number), "{info}");
            assert_eq!((&info["persistent"], &info["busy"]), (&is_persistent(number).into(), &false.into()), "{info}");
        }

        there.command("quit");
        there.ends_with(0);
        let mut again = lab.run(&hardware(&disk), "fill=16M rate=0");
        Guest::booting_at(&mut again).beats(1);
        let kept: Vec<_> = bitmaps(&again).into_keys().collect();
        assert_eq!(kept.len(), (0..COUNT).filter(|number| is_persistent(*number)).count(), "{kept:?}");
        for number in (0..COUNT).filter(|number| is_persistent(*number)) {
            assert_eq!(sha256(&again, number), expected[number], "b{number} after {mode} and a shutdown");
        }
        again.command("quit");
        again.ends_with(0);
    }
}

#[test]
fn where_the_source_dies_half_way_what_is_complete_stays_and_the_rest_is_gone() {
    let lab = Lab::new();
    let disk = lab.disk(DISK);
    let (mut here, mut guest, before) = with_bitmaps(&lab, &disk);
    guest.writes_blocks(300);
    let mut there = lab.receive(Transport::Tcp);
    let mut client = there.client();
    // All of RAM comes before the commit, and only bitmaps after it.
    let migration = lab.migrate(&here, &there.address, &["--mode", "precopy", "--downtime", "500ms", "--postcopy-bandwidth", "20K"]);
    let busy = |ferry: &Ferry| bitmaps(ferry).values().filter(|bitmap| bitmap["busy"] == true).count();
    wait_until(&mut client, "some bitmaps to have come", |_| (1..COUNT).contains(&busy(&there)));
    here.process.kill();
    migration.end();
    guest.moved_to(&mut there);
    wait_until(&mut client, "the loss to be noticed", |_| there.migration_status() == "postcopy-paused");
    // The guest does not care.
    guest.writes_blocks(50);
    let unfinished: Vec<_> = bitmaps(&there).into_iter().filter(|(_, bitmap)| bitmap["busy"] == true).map(|(name, _)| name).collect();
    assert!((1..COUNT).contains(&unfinished.len()), "{unfinished:?}");
    there.command("cancel");
    wait_until(&mut client, "the end of the migration", |_| bitmaps(&there).values().all(|bitmap| bitmap["busy"] == false));
    there.ask("stop");
    let now = disk.snapshot();
    let left = bitmaps(&there);
    for number in 0..COUNT {
        let name = format!("b{number}");
        assert_eq!(left.contains_key(&name), !unfinished.contains(&name), "{name} of {unfinished:?}");
        if let Some(info) = left.get(&name) {
            assert_eq!(sha256(&there, number), now.bitmap_sha256(&before, granularity(number)), "{info}");
        }
    }
    there.command("quit");
    there.ends_with(0);
}
