use serde_json::json;

use super::*;

fn event(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

#[test]
fn a_final_status_or_a_pause_ends_the_following() {
    let mut last_seen = Status::None;
    for status in ["setup", "active", "device", "postcopy-active", "postcopy-recover", "cancelling"] {
        let event = event(json!({ "event": "MIGRATION", "data": { "status": status } }));
        assert!(end_in_event(&event, &mut last_seen).is_none(), "{status}");
    }
    assert_eq!(last_seen, Status::Cancelling);
    assert!(end_in_event(&event(json!({ "event": "STOP" })), &mut last_seen).is_none());
    let paused = event(json!({ "event": "MIGRATION", "data": { "status": "postcopy-paused" } }));
    assert_eq!(end_in_event(&paused, &mut last_seen).unwrap().status, Status::PostcopyPaused);
    let report = Report { status: Status::Failed, error: Some("why".into()), ..Default::default() };
    let end =
        end_in_event(&event(json!({ "event": "MIGRATION", "data": { "status": "failed", "report": report } })), &mut last_seen).unwrap();
    assert_eq!((end.status, end.report.is_some()), (Status::Failed, true));
    assert_eq!(end.into_result().unwrap_err().to_string(), "why");
}

#[test]
fn a_pause_ends_the_following_and_says_how_to_go_on() {
    let event = event(json!({ "event": "MIGRATION", "data": { "status": "postcopy-paused" } }));
    let end = end_in_event(&event, &mut Status::PostcopyActive).unwrap();
    assert!(end.into_result().unwrap_err().to_string().contains("`ferry recover`"));
}

#[test]
fn only_completed_is_success() {
    for status in [Status::None, Status::Failed, Status::Cancelled] {
        assert!(End { status, report: None, error: None }.into_result().is_err());
    }
    assert!(End { status: Status::Completed, report: None, error: None }.into_result().is_ok());
}

#[test]
fn a_source_that_vanishes_is_a_failure_that_says_where_the_guest_is() {
    let before = lost(ClientError::Closed, Status::Active).to_string();
    assert!(before.contains("ended with the source"), "{before}");
    let after = lost(ClientError::Closed, Status::PostcopyActive).to_string();
    assert!(after.contains("handed over to the destination"), "{after}");
}
