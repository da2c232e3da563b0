//! What well-behaved clients see.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ferry::qmp::client::{Client, ClientError};
use ferry::qmp::command::{Migrate, ProtocolCommand};
use ferry::qmp::error::ErrorClass;
use ferry::qmp::parameters::{MigrateParameters, MigrateSetParameters};
use ferry::qmp::{Command, Event};
use serde_json::{Value, json};

use crate::raw_client::{LIMIT, RawClient};
use crate::recorder::Fixture;

#[test]
fn commands_come_after_negotiation_which_comes_once() {
    let fixture = Fixture::start();
    let mut client = RawClient::connect(&fixture.path);
    assert_eq!(client.ask(r#"{"execute": "query-status"}"#)["error"]["class"], "CommandNotFound");
    let out_of_band = r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#;
    assert_eq!(client.ask(out_of_band)["error"]["class"], "GenericError");
    assert_eq!(client.ask(r#"{"execute": "qmp_capabilities"}"#), json!({ "return": {} }));
    assert_eq!(client.ask(r#"{"execute": "qmp_capabilities"}"#)["error"]["class"], "CommandNotFound");
    let status = client.ask(r#"{"execute": "query-status", "id": [1, "x"]}"#);
    assert_eq!(status, json!({ "return": { "status": "running", "running": true }, "id": [1, "x"] }));
}

#[test]
fn commands_need_no_line_ends_and_may_come_in_pieces() {
    let fixture = Fixture::start();
    let mut client = RawClient::negotiated(&fixture.path);
    client.send(r#"{"execute":"query-status","id":1}{"execute":"query-version","id":2}{"exec"#);
    assert_eq!((client.read()["id"].clone(), client.read()["id"].clone()), (json!(1), json!(2)));
    for byte in br#"ute":"query-commands","id":3}"# {
        client.send([*byte]);
    }
    let answer = client.read();
    assert_eq!(answer["id"], 3);
    let names: Vec<_> = answer["return"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    for name in ["qmp_capabilities", "query-commands", "migrate", "block-dirty-bitmap-add"] {
        assert!(names.contains(&name), "{names:?}");
    }
}

#[test]
fn events_reach_all_negotiated_clients_with_their_time() {
    let fixture = Fixture::start();
    let mut clients: Vec<_> = (0..5).map(|_| RawClient::negotiated(&fixture.path)).collect();
    let mut silent = RawClient::connect(&fixture.path);
    fixture.events.emit(&Event::Stop);
    for client in &mut clients {
        let event = client.read();
        assert_eq!((&event["event"], event.get("data")), (&json!("STOP"), None));
        let timestamp = &event["timestamp"];
        assert!(timestamp["seconds"].as_u64().unwrap() > 1_700_000_000 && timestamp["microseconds"].as_u64().unwrap() < 1_000_000);
    }
    assert!(silent.ask(r#"{"execute": "qmp_capabilities"}"#)["return"].is_object(), "the event must not reach it");
    assert_eq!(clients[0].ask(r#"{"execute": "quit"}"#)["data"], json!({ "guest": false, "reason": "host-qmp-quit" }));
    assert_eq!(clients[0].read(), json!({ "return": {} }));
    assert_eq!(silent.read()["event"], "SHUTDOWN");
    assert!(fixture.has_quit());
}

#[test]
fn answers_reach_a_client_that_has_closed_its_direction() {
    let fixture = Fixture::start();
    let mut client = RawClient::connect(&fixture.path);
    client.send(r#"{"execute": "qmp_capabilities"} {"execute": "query-status", "id": 9}"#);
    client.stream.get_ref().shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read(), json!({ "return": {} }));
    assert_eq!(client.read()["id"], 9);
    assert_eq!(client.read(), Value::Null);
}

#[test]
fn server_is_gone_without_a_trace_when_dropped() {
    let fixture = Fixture::start();
    let mut client = RawClient::negotiated(&fixture.path);
    assert_eq!(fixture.server.clients(), 1);
    drop(fixture.server);
    assert!(!fixture.path.exists());
    assert_eq!(client.read(), Value::Null);
    fixture.events.emit(&Event::Stop);
}

#[test]
fn shutdown_can_wait_for_clients_to_read_and_to_leave() {
    let fixture = Fixture::start();
    let client = RawClient::negotiated(&fixture.path);
    fixture.events.emit(&Event::Stop);
    assert!(fixture.server.flush(LIMIT));
    assert!(!fixture.server.wait_for_clients_to_leave(Duration::from_millis(1)));
    let leaving = std::thread::spawn(move || drop(client));
    assert!(fixture.server.wait_for_clients_to_leave(LIMIT));
    leaving.join().unwrap();
}

#[test]
fn ferry_s_own_client_follows_a_migration() {
    let fixture = Fixture::start();
    let mut client = Client::connect(&fixture.path).unwrap();
    assert!(client.execute(&ProtocolCommand::QueryVersion).unwrap()["package"].as_str().unwrap().starts_with("ferry"));
    let changes = MigrateSetParameters { downtime_limit: Some(20), ..Default::default() };
    client.execute(&Command::MigrateSetParameters(Box::new(changes))).unwrap();
    let parameters: MigrateParameters = serde_json::from_value(client.execute(&Command::QueryMigrateParameters).unwrap()).unwrap();
    assert_eq!(parameters, MigrateParameters { downtime_limit: 20, ..Default::default() });
    client.execute(&Command::Migrate(Migrate { uri: "tcp:h:1".into(), detach: None, resume: false })).unwrap();
    let mut names = Vec::new();
    loop {
        let event = client.next_event(Instant::now() + LIMIT).unwrap().expect("an event in time");
        names.push(event["event"].as_str().unwrap().to_string());
        if event["data"]["status"] == "completed" {
            assert_eq!(event["data"]["report"]["total-us"], 5000);
            break;
        }
    }
    assert_eq!(names, ["MIGRATION", "MIGRATION", "MIGRATION_PASS", "MIGRATION"]);
    assert!(client.next_event(Instant::now()).unwrap().is_none());
    let refused = client.execute(&Command::Migrate(Migrate { uri: "nowhere".into(), detach: None, resume: false }));
    assert!(matches!(refused, Err(ClientError::Command(error)) if error.class == ErrorClass::GenericError));
    drop(fixture);
    assert!(matches!(client.execute(&Command::Stop), Err(ClientError::Closed)));
}

#[test]
fn second_server_at_the_same_path_is_refused() {
    let fixture = Fixture::start();
    let error = ferry::qmp::socket::PathListener::bind(&fixture.path).unwrap_err().to_string();
    assert!(error.contains("in use by another process"), "{error}");
    assert!(UnixStream::connect(&fixture.path).is_ok(), "the first one must live on");
}
