//! One client's session: greeting, negotiation, then commands and answers.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crossbeam_channel::Receiver;
use serde_json::{Value, json};

use super::Handler;
use super::command::{Command, ProtocolCommand};
use super::error::QmpError;
use super::events::{Connection, Events, Message};
use super::request::{self, Request};
use super::splitter::Splitter;

/// A client that has not read for this long, although there is something for it, loses its connection.
const READ_LIMIT: Duration = Duration::from_secs(10);

/// Serves the client until it goes away.
pub(super) fn serve(mut stream: UnixStream, client: &Connection, events: &Events, handler: &dyn Handler) {
    let mut session = Session { negotiated: false, handler };
    let greeting = json!({ "QMP": { "version": version(), "capabilities": [] } });
    if !client.send(&greeting) {
        return;
    }
    let mut splitter = Splitter::default();
    let mut buffer = [0; 4096];
    loop {
        let received = match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        for object in received.iter().filter_map(|byte| splitter.push(*byte)) {
            // Counted until the answer is queued, where it counts as a message: a flush that `quit` brings about waits for its answer.
            let _executing = events.unsent().enter();
            let (id, result) = match object {
                Ok(text) => {
                    let (id, request) = request::parse(&text);
                    (id, request.and_then(|request| session.execute(request)))
                }
                Err(error) => (None, Err(QmpError::generic(error.to_string()))),
            };
            let answer = response(id, result);
            let sent = if session.negotiated && !client.is_negotiated() { events.begin(client, &answer) } else { client.send(&answer) };
            if !sent {
                return;
            }
        }
    }
}

/// Writes a client's messages until nobody has any more or the client has not read for [`READ_LIMIT`], and closes the connection.
pub(super) fn write_messages(mut stream: UnixStream, messages: Receiver<Message>) {
    if stream.set_write_timeout(Some(READ_LIMIT)).is_ok() {
        for message in messages {
            if stream.write_all(&message.line).is_err() {
                break;
            }
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
}

struct Session<'a> {
    negotiated: bool,
    handler: &'a dyn Handler,
}

impl Session<'_> {
    fn execute(&mut self, request: Request) -> Result<Value, QmpError> {
        match (request, self.negotiated) {
            (Request::Protocol(ProtocolCommand::Capabilities(arguments)), false) => {
                if let Some(unknown) = arguments.enable.first() {
                    return Err(QmpError::generic(format!("Capability '{unknown}' not available")));
                }
                self.negotiated = true;
                Ok(json!({}))
            }
            (Request::Protocol(ProtocolCommand::Capabilities(_)), true) => {
                Err(QmpError::command_not_found("Capabilities negotiation is already complete, command ignored"))
            }
            (_, false) => Err(QmpError::command_not_found("Expecting capabilities negotiation with 'qmp_capabilities'")),
            (Request::Protocol(ProtocolCommand::QueryVersion), true) => Ok(version()),
            (Request::Protocol(ProtocolCommand::QueryCommands), true) => {
                Ok(ProtocolCommand::NAMES.iter().chain(Command::NAMES).map(|name| json!({ "name": name })).collect())
            }
            (Request::Guest(command), true) => self.handler.execute(command),
        }
    }
}

/// Ferry's version in the place where QMP has QEMU's.
fn version() -> Value {
    let number = |text: &str| text.parse::<u32>().unwrap_or_default();
    json!({
        "qemu": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("ferry-", env!("CARGO_PKG_VERSION")),
    })
}

fn response(id: Option<Value>, result: Result<Value, QmpError>) -> Value {
    let mut response = match result {
        Ok(value) => json!({ "return": value }),
        Err(error) => json!({ "error": error }),
    };
    if let Some(id) = id {
        response["id"] = id;
    }
    response
}
