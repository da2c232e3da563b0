//! A small blocking client, for Ferry's own commands.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use super::command::{EnableCapabilities, ProtocolCommand};
use super::error::QmpError;

/// Longest line from the server.
const MAX_LINE: usize = 16 << 20;
/// How long a command may take to be answered.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Why a command was not carried out.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot connect to {}: {source}; is a Ferry with --qmp {} running?", path.display(), path.display())]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The server ended the connection.
    #[error("the Ferry at the control socket went away")]
    Closed,
    /// The connection broke.
    #[error("lost the connection to the control socket: {0}")]
    Io(#[from] std::io::Error),
    /// No answer in time.
    #[error("no answer from the control socket within {} s", ANSWER_LIMIT.as_secs())]
    Timeout,
    /// The server does not speak QMP.
    #[error("the control socket does not speak QMP: {0}")]
    Protocol(String),
    /// The server answered with an error.
    #[error(transparent)]
    Command(QmpError),
}

/// A negotiated session.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    received: Vec<u8>,
    events: VecDeque<Map<String, Value>>,
}

impl Client {
    /// Connects to the control socket at `path` and negotiates.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let mut client = Client { stream, received: Vec::new(), events: VecDeque::new() };
        let greeting = client.next_message(Instant::now() + ANSWER_LIMIT)?.ok_or(ClientError::Timeout)?;
        if !greeting.contains_key("QMP") {
            return Err(ClientError::Protocol("it does not greet".into()));
        }
        client.execute(&ProtocolCommand::Capabilities(EnableCapabilities::default()))?;
        Ok(client)
    }

    /// Sends `command`, a [`Command`](super::Command) or [`ProtocolCommand`], and waits for its answer. Events that come before it are
    /// kept for [`Client::next_event`].
    pub fn execute(&mut self, command: &impl Serialize) -> Result<Value, ClientError> {
        let mut line = serde_json::to_vec(command).map_err(|error| ClientError::Protocol(error.to_string()))?;
        line.push(b'\n');
        self.stream.write_all(&line).map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe => ClientError::Closed,
            _ => ClientError::Io(error),
        })?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let mut message = self.next_message(deadline)?.ok_or(ClientError::Timeout)?;
            if let Some(value) = message.remove("return") {
                return Ok(value);
            }
            if let Some(error) = message.remove("error") {
                let error = QmpError::deserialize(error).map_err(|error| ClientError::Protocol(error.to_string()))?;
                return Err(ClientError::Command(error));
            }
            self.events.push_back(message);
        }
    }

    /// The next event, with its `event`, `data` and `timestamp`; nothing if none comes before `deadline`.
    pub fn next_event(&mut self, deadline: Instant) -> Result<Option<Map<String, Value>>, ClientError> {
        match self.events.pop_front() {
            Some(event) => Ok(Some(event)),
            None => self.next_message(deadline),
        }
    }

    fn next_message(&mut self, deadline: Instant) -> Result<Option<Map<String, Value>>, ClientError> {
        let mut buffer = [0; 16384];
        let mut searched = 0;
        loop {
            if let Some(end) = self.received.get(searched..).and_then(|new| new.iter().position(|byte| *byte == b'\n')) {
                let line: Vec<u8> = self.received.drain(..=searched + end).collect();
                return serde_json::from_slice(&line).map(Some).map_err(|error| ClientError::Protocol(error.to_string()));
            }
            searched = self.received.len();
            if searched > MAX_LINE {
                return Err(ClientError::Protocol("a line without end".into()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(count) => self.received.extend(buffer.iter().take(count)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(ClientError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
