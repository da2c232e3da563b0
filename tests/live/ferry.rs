//! A `ferry run` or `ferry receive` and its control socket.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use ferry::qmp::client::{Client, ClientError};
use serde_json::{Map, Value, json};

use super::output::{LIMIT, Output};
use super::process::{End, Process};

/// One guest's process.
pub struct Ferry {
    pub process: Process,
    pub qmp: PathBuf,
    /// What it listens on, if it receives.
    pub address: String,
}

impl Ferry {
    /// Its serial console, for whoever follows the guest.
    pub fn console(&mut self) -> Output {
        self.process.stdout.take().expect("somebody follows this console already")
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.qmp).unwrap()
    }

    /// Executes a QMP command over a connection of its own.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        execute(&mut self.client(), command, arguments)
    }

    /// Executes a QMP command without arguments that must not fail.
    pub fn ask(&self, command: &str) -> Value {
        self.execute(command, json!({})).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Why a QMP command was refused.
    pub fn refusal(&self, command: &str, arguments: Value) -> String {
        match self.execute(command, arguments) {
            Err(ClientError::Command(error)) => error.desc,
            other => panic!("{command} must be refused, but: {other:?}"),
        }
    }

    /// The status of `query-status`.
    pub fn state(&self) -> String {
        self.ask("query-status")["status"].as_str().unwrap().to_string()
    }

    /// The status of `query-migrate`.
    pub fn migration_status(&self) -> String {
        self.ask("query-migrate")["status"].as_str().unwrap_or("none").to_string()
    }

    /// Waits for its end.
    pub fn end(&mut self) -> End {
        self.process.ends_within(LIMIT).unwrap_or_else(|| panic!("no end; it said:\n{}", self.process.stderr.text_so_far()))
    }

    /// It must end with this status.
    pub fn ends_with(&mut self, status: i32) {
        let end = self.end();
        assert_eq!(end, End::Status(status), "it said:\n{}", self.process.stderr.text_so_far());
    }

    /// A short command as a person gives it; its stdout.
    pub fn command(&self, name: &str) -> String {
        let mut process = Process::ferry([name.as_ref(), "--qmp".as_ref(), self.qmp.as_os_str()]);
        let end = process.ends_within(LIMIT);
        assert_eq!(end, Some(End::Status(0)), "ferry {name}: {}", process.stderr.text_so_far());
        process.stdout.take().unwrap().text_to_end()
    }

    /// The refusal of a short command.
    pub fn command_fails(&self, name: &str) -> String {
        let mut process = Process::ferry([name.as_ref(), "--qmp".as_ref(), self.qmp.as_os_str()]);
        assert_eq!(process.ends_within(LIMIT), Some(End::Status(1)), "ferry {name}");
        process.stderr.text_to_end()
    }
}

/// Executes a QMP command.
pub fn execute(client: &mut Client, command: &str, arguments: Value) -> Result<Value, ClientError> {
    client.execute(&json!({ "execute": command, "arguments": arguments }))
}

/// Waits for an event, `MIGRATION` with a status for example.
pub fn wait_for_event(client: &mut Client, what: &str, is_it: impl Fn(&Map<String, Value>) -> bool) -> Map<String, Value> {
    let deadline = Instant::now() + LIMIT;
    let mut seen = Vec::new();
    loop {
        match client.next_event(deadline) {
            Ok(Some(event)) if is_it(&event) => return event,
            Ok(Some(event)) => seen.push(Value::Object(event).to_string()),
            Ok(None) => panic!("no event {what} within {LIMIT:?}, but {seen:?}"),
            Err(error) => panic!("no event {what}: {error}; seen {seen:?}"),
        }
    }
}

/// Waits for the event MIGRATION with this status.
pub fn wait_for_migration(client: &mut Client, status: &str) -> Map<String, Value> {
    wait_for_event(client, status, |event| event["event"] == "MIGRATION" && event["data"]["status"] == status)
}

/// Waits until `holds`, asking again after each event and at least every 50 ms, because not everything has an event.
pub fn wait_until(client: &mut Client, what: &str, mut holds: impl FnMut(&mut Client) -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds(client) {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        client.next_event(Instant::now() + Duration::from_millis(50)).unwrap();
    }
}
