use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::*;
use crate::block::sidecar::Contents;
use crate::vm::config::{DiskConfig, DiskOptions};

const SIZE: u64 = 8 << 20;
const GRANULARITY: u64 = 512;

fn disks(directory: &Path, readonly: bool) -> Vec<Arc<Disk>> {
    let disk = |id: &str| {
        let path = directory.join(id);
        File::options().create(true).truncate(false).write(true).open(&path).unwrap().set_len(SIZE).unwrap();
        let disk = Disk::open(DiskConfig { id: id.into(), path, readonly, options: DiskOptions::default() }).unwrap();
        disk.acquire().unwrap();
        disk
    };
    ["a", "b"].map(disk).to_vec()
}

fn carry_out(disks: &[Arc<Disk>], actions: Value) -> Result<(), String> {
    let actions: Vec<TransactionAction> = serde_json::from_value(actions).unwrap();
    Transactions::default().carry_out(disks, &actions).map_err(|error| error.desc)
}

fn add(node: &str, name: &str, persistent: bool) -> Value {
    json!({ "type": "block-dirty-bitmap-add", "data": { "node": node, "name": name, "granularity": GRANULARITY, "persistent": persistent } })
}

fn remove(node: &str, name: &str) -> Value {
    json!({ "type": "block-dirty-bitmap-remove", "data": { "node": node, "name": name } })
}

/// The names in the sidecar of disk `a`.
fn listed(directory: &Path) -> Vec<String> {
    let bytes = fs::read(directory.join("a.bitmaps")).unwrap_or_default();
    let contents = Contents::decode(&bytes).map(|contents| contents.bitmaps).unwrap_or_default();
    contents.iter().map(|bitmap| bitmap.name.to_string()).collect()
}

#[test]
fn the_sidecar_names_the_persistent_bitmaps() {
    let directory = tempfile::tempdir().unwrap();
    let disks = disks(directory.path(), false);
    carry_out(&disks, json!([add("a", "kept", true), add("a", "volatile", false), add("b", "other", true)])).unwrap();
    assert_eq!(listed(directory.path()), ["kept"]);
    let failing = json!([add("a", "more", true), remove("a", "kept"), { "type": "abort", "data": {} }]);
    carry_out(&disks, failing).unwrap_err();
    assert_eq!(listed(directory.path()), ["kept"]);
    carry_out(&disks, json!([remove("a", "kept")])).unwrap();
    assert!(!directory.path().join("a.bitmaps").exists());
}

#[test]
fn a_disk_without_a_place_refuses_persistent_bitmaps_and_no_others() {
    let directory = tempfile::tempdir().unwrap();
    drop(disks(directory.path(), false));
    let disks = disks(directory.path(), true);
    let refusal = carry_out(&disks, json!([add("a", "x", true)])).unwrap_err();
    assert_eq!(refusal, "Can't make bitmap 'x' persistent in 'a': the disk is read-only");
    carry_out(&disks, json!([add("a", "x", false), remove("a", "x")])).unwrap();
}

/// One thread writes block after block, to disk `a` and then to disk `b`; at one moment `b` never has a block that `a` has not.
#[test]
fn a_transaction_is_one_moment_on_all_disks() {
    let directory = tempfile::tempdir().unwrap();
    let disks = disks(directory.path(), false);
    carry_out(&disks, json!([add("a", "live", false), add("b", "live", false)])).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let [a, b] = [&disks[0], &disks[1]].map(|disk| disk.io().unwrap());
            for offset in (0..SIZE).step_by(GRANULARITY as usize) {
                a.write_zeroes(offset, GRANULARITY, false).unwrap();
                b.write_zeroes(offset, GRANULARITY, false).unwrap();
            }
            ended.store(true, Ordering::Release);
        });
        let of = |kind: &str, node: &str, more: Value| {
            let mut data = json!({ "node": node });
            data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({ "type": format!("block-dirty-bitmap-{kind}"), "data": data })
        };
        let mut moments = 0;
        while !ended.load(Ordering::Acquire) {
            let then = json!({ "name": "then", "granularity": GRANULARITY, "disabled": true });
            let merge = json!({ "target": "then", "bitmaps": ["live"] });
            let mut actions = vec![of("add", "a", then.clone()), of("add", "b", then), of("merge", "a", merge.clone())];
            // So that there is time for a write, which would be in `b` alone.
            actions.extend((0..50).map(|_| of("enable", "a", json!({ "name": "live" }))));
            actions.push(of("merge", "b", merge));
            carry_out(&disks, json!(actions)).unwrap();
            let [a, b] = [&disks[0], &disks[1]].map(|disk| disk.bitmaps().info()[1].count);
            assert!(a == b || a == b + GRANULARITY, "{a} bytes of a and {b} of b");
            moments += usize::from(a > 0 && a < SIZE);
            carry_out(&disks, json!([remove("a", "then"), remove("b", "then")])).unwrap();
        }
        assert!(moments > 0);
    });
}
