use std::collections::BTreeSet;

use serde_json::json;

use super::*;

const P: BackupId = BackupId([0xaa; 16]);
const N: BackupId = BackupId([0xbb; 16]);

fn names() -> Names {
    Names { disk: "root".into(), bitmap: "b".into() }
}

fn state(names_found: &[String], more: &Value) -> State {
    let mut bitmaps = Vec::new();
    for name in names_found {
        let mut bitmap = json!({ "name": name, "granularity": 4096, "recording": name == "b", "persistent": true });
        bitmap.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        bitmaps.push(bitmap);
    }
    names().read(&bitmaps.into())
}

/// Names of the bitmaps after `actions`, each of which must be possible.
fn after(before: &[String], actions: &[TransactionAction]) -> BTreeSet<String> {
    let mut bitmaps: BTreeSet<String> = before.iter().cloned().collect();
    for action in actions {
        match action {
            TransactionAction::BlockDirtyBitmapAdd(add) => assert!(bitmaps.insert(add.name.clone()), "{add:?}"),
            TransactionAction::BlockDirtyBitmapRemove(bitmap) => assert!(bitmaps.remove(&bitmap.name), "{bitmap:?}"),
            TransactionAction::BlockDirtyBitmapMerge(merge) => assert!(bitmaps.contains(&merge.target), "{merge:?}"),
            _ => {}
        }
    }
    bitmaps
}

fn set(of: &[String]) -> BTreeSet<String> {
    of.iter().cloned().collect()
}

#[test]
fn names_of_others_are_left_alone() {
    let id = P.to_string();
    let others = ["bb", "b.since.", "b.since.xyz", "b-since", "b.sincE.0"].map(String::from);
    assert_eq!(state(&others, &json!({})), State { bitmap: None, since: vec![], taking: vec![], before: vec![] });
    assert_eq!(state(&[format!("b.taking.{id}")], &json!({})).taking, [P]);
    assert!(Names::snapshot(P).len() <= crate::block::snapshot::MAX_NAME);
}

#[test]
fn backups_build_on_a_bitmap_that_follows_one() {
    let names = names();
    let both = ["b".into(), names.since(P)];
    assert_eq!(state(&both, &json!({})).nothing_to_build_on(), None);
    assert_eq!(state(&both[..1], &json!({})).nothing_to_build_on(), Some(""));
    assert_eq!(state(&both[1..], &json!({})).nothing_to_build_on(), Some(""));
    assert!(state(&both, &json!({ "inconsistent": true })).nothing_to_build_on().unwrap().contains("inconsistent"));
    assert!(state(&both, &json!({ "recording": false })).nothing_to_build_on().unwrap().contains("disabled"));
}

#[test]
fn a_backup_that_came_to_no_end_is_as_if_it_had_never_begun() {
    let names = names();
    let found = ["b".into(), names.since(P)];
    let begun_at = state(&found, &json!({}));
    let begun = after(&found, &names.beginning(&begun_at, begun_at.bitmap.unwrap(), N));
    assert_eq!(begun, set(&["b".into(), names.taking(N), names.before(P)]));
    let begun: Vec<_> = begun.into_iter().collect();
    let left = state(&begun, &json!({}));
    assert_eq!(after(&begun, &names.recovery(&left, false)), set(&found));
    // Its file may be there: what comes next follows that as well.
    assert_eq!(after(&begun, &names.recovery(&left, true)), set(&["b".into(), names.since(P), names.since(N)]));
}

#[test]
fn a_first_backup_that_came_to_no_end_cannot_be_followed() {
    let names = names();
    let begun: Vec<_> = after(&[], &names.first(&state(&[], &json!({})), N, 4096, true)).into_iter().collect();
    assert_eq!(set(&begun), set(&["b".into(), names.taking(N)]));
    let recovered: Vec<_> = after(&begun, &names.recovery(&state(&begun, &json!({})), true)).into_iter().collect();
    assert_eq!(recovered, ["b"]);
}

#[test]
fn whatever_got_lost_the_bitmap_never_follows_a_backup_wrongly() {
    let names = names();
    let begun = ["b".into(), names.taking(N), names.before(P)];
    for kept in 0..1 << begun.len() {
        let found: Vec<_> = (0..).zip(&begun).filter(|(place, _)| kept & (1 << place) != 0).map(|(_, name)| name.clone()).collect();
        let recovered = after(&found, &names.recovery(&state(&found, &json!({})), true));
        let follows = recovered.contains(&names.since(P)) || recovered.contains(&names.since(N));
        assert_eq!(follows, found.len() == begun.len(), "{found:?} became {recovered:?}");
        assert!(!recovered.iter().any(|name| name.contains("taking") || name.contains("before")), "{recovered:?}");
    }
}

#[test]
fn a_bitmap_that_is_of_no_use_is_replaced() {
    let names = names();
    let found = ["b".into(), names.since(P), names.taking(N), names.before(P)];
    let lost = json!({ "inconsistent": true });
    let recovered: Vec<_> = after(&found, &names.recovery(&state(&found, &lost), true)).into_iter().collect();
    assert_eq!(recovered, ["b".into(), names.since(P)]);
    let actions = names.first(&state(&recovered, &lost), N, 4096, true);
    assert_eq!(after(&recovered, &actions), set(&["b".into(), names.taking(N)]));
    assert!(matches!(actions.last(), Some(TransactionAction::BlockSnapshotAdd(_))));
}
