use serde_json::json;

use super::*;

fn parse(name: &str, arguments: Value) -> Result<Command, QmpError> {
    Command::parse(name, arguments.as_object().unwrap()).expect("a known command")
}

#[test]
fn arguments_are_typed() {
    let migrate = Migrate { uri: "tcp:host:4444".into(), detach: Some(true), resume: false };
    assert_eq!(parse("migrate", json!({ "uri": "tcp:host:4444", "detach": true })), Ok(Command::Migrate(migrate)));
    assert_eq!(parse("stop", json!({})), Ok(Command::Stop));
    assert!(Command::parse("no-such-command", &Map::new()).is_none());
}

#[test]
fn missing_unknown_and_mistyped_arguments_are_errors_that_name_them() {
    let bad = [
        ("migrate", json!({}), "uri"),
        ("migrate", json!({ "uri": 5 }), "integer"),
        ("migrate", json!({ "uri": "tcp:h:1", "blk": true }), "blk"),
        ("stop", json!({ "now": true }), "now"),
        ("migrate-continue", json!({}), "state"),
        ("migrate-continue", json!({ "state": "waiting" }), "waiting"),
        ("migrate-set-parameters", json!({ "downtime": 5 }), "downtime"),
        ("migrate-set-parameters", json!({ "max-bandwidth": 1.5 }), "1.5"),
        ("migrate-set-parameters", json!({ "ferry-mode": "fast" }), "fast"),
        ("migrate-set-capabilities", json!({ "capabilities": [{ "capability": "nonsense", "state": true }] }), "nonsense"),
    ];
    for (name, arguments, word) in bad {
        let error = parse(name, arguments).unwrap_err();
        assert!(error.desc.contains(name) && error.desc.contains(word), "{error}");
    }
}

#[test]
fn what_a_client_writes_the_server_reads() {
    let add = BlockDirtyBitmapAdd { node: "d0".into(), name: "b".into(), granularity: None, persistent: false, disabled: false };
    for command in [Command::QueryStatus, Command::BlockDirtyBitmapAdd(add)] {
        let wire = serde_json::to_value(&command).unwrap();
        let arguments = wire.get("arguments").cloned().unwrap_or_else(|| json!({}));
        assert_eq!(parse(wire["execute"].as_str().unwrap(), arguments), Ok(command));
    }
}

#[test]
fn names_are_unique() {
    let mut names: Vec<_> = ProtocolCommand::NAMES.iter().chain(Command::NAMES).collect();
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
}
