//! Events on their way to all clients.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use serde_json::{Value, json};

use super::event::Event;
use super::gauge::{Gauge, Token};

/// Messages that wait for one client; one that lets more come together is dropped.
const QUEUE_LENGTH: usize = 256;

/// Sends events to all clients that have negotiated. Clones share the clients. It may exist before a server and without one.
#[derive(Clone, Debug, Default)]
pub struct Events(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    clients: Mutex<Vec<Arc<Connection>>>,
    connected: Gauge,
    unsent: Gauge,
}

/// A connected client as the rest of the server sees it.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    queue: Sender<Message>,
    negotiated: AtomicBool,
    unsent: Gauge,
}

/// One line for a client, counted as unsent until dropped.
#[derive(Debug)]
pub(super) struct Message {
    pub line: Arc<[u8]>,
    _unsent: Token,
}

impl Events {
    /// Sends `event` with the time of now. Waits for nobody.
    pub fn emit(&self, event: &Event) {
        let Some(line) = event_line(event) else { return };
        self.clients().retain(|client| !client.is_negotiated() || client.offer(line.clone()));
    }

    /// Takes in a client. Its messages come out of the receiver; it is counted as connected while the token lives.
    pub(super) fn add_client(&self, stream: UnixStream) -> (Arc<Connection>, Receiver<Message>, Token) {
        let (queue, messages) = bounded(QUEUE_LENGTH);
        let client = Arc::new(Connection { stream, queue, negotiated: AtomicBool::new(false), unsent: self.0.unsent.clone() });
        self.clients().push(client.clone());
        (client, messages, self.0.connected.enter())
    }

    /// Sends a client the answer to qmp_capabilities, and events from then on: none comes before it, and none is left out that the client
    /// could have brought about having read it. False when the client is gone.
    pub(super) fn begin(&self, client: &Connection, answer: &Value) -> bool {
        let Some(line) = to_line(answer) else { return false };
        // Events are queued under the same lock, for which `emit` must not wait long: the answer waits for no room, either.
        let _clients = self.clients();
        client.negotiated.store(true, Ordering::Relaxed);
        client.offer(line)
    }

    /// Forgets a client. Its connection stays until what is queued has been written: it may have closed only its own direction.
    pub(super) fn remove_client(&self, client: &Arc<Connection>) {
        self.clients().retain(|other| !Arc::ptr_eq(other, client));
    }

    pub(super) fn disconnect_all(&self) {
        self.clients().drain(..).for_each(|client| client.disconnect());
    }

    pub(super) fn connected(&self) -> &Gauge {
        &self.0.connected
    }

    /// Commands being executed and messages not yet written.
    pub(super) fn unsent(&self) -> &Gauge {
        &self.0.unsent
    }

    fn clients(&self) -> MutexGuard<'_, Vec<Arc<Connection>>> {
        self.0.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// Queues `message` behind the others; waits while the queue is full, which makes a client wait that sends commands without reading
    /// the answers. False when the client is gone.
    pub fn send(&self, message: &Value) -> bool {
        let Some(line) = to_line(message) else { return false };
        self.queue.send(self.message(line)).is_ok()
    }

    /// Whether the client gets events.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated.load(Ordering::Relaxed)
    }

    /// Queues a message at once; a client whose queue is full has stopped reading and loses its connection. False when the client is gone.
    fn offer(&self, line: Arc<[u8]>) -> bool {
        match self.queue.try_send(self.message(line)) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.disconnect();
                false
            }
        }
    }

    fn message(&self, line: Arc<[u8]>) -> Message {
        Message { line, _unsent: self.unsent.enter() }
    }

    fn disconnect(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn event_line(event: &Event) -> Option<Arc<[u8]>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut value = serde_json::to_value(event).ok()?;
    value["timestamp"] = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
    to_line(&value)
}

fn to_line(value: &Value) -> Option<Arc<[u8]>> {
    let mut line = serde_json::to_vec(value).ok()?;
    line.extend(b"\r\n");
    Some(line.into())
}

#[cfg(test)]
mod tests;
