//! Listens, and gives each client its threads.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Handler;
use super::events::Events;
use super::session;
use super::socket::{PathListener, SocketError};

/// Clients at a time; one more is turned away.
const MAX_CLIENTS: usize = 32;

/// The control socket. Dropping it disconnects all clients and removes the path; answers that nobody waited for with [`Server::flush`]
/// may be lost.
pub struct Server {
    listener: Arc<PathListener>,
    accepting: Option<thread::JoinHandle<()>>,
    events: Events,
}

impl Server {
    /// Listens at `path` (mode 0600), lets `handler` carry out the commands and sends its clients the `events`.
    pub fn start(path: &Path, handler: Arc<dyn Handler>, events: Events) -> Result<Self, SocketError> {
        let listener = Arc::new(PathListener::bind(path)?);
        let failed = |source| SocketError::Listen { path: path.to_owned(), source };
        let accepting = thread::Builder::new().name("qmp".into()).spawn({
            let (listener, events) = (listener.clone(), events.clone());
            move || accept_clients(&listener, &handler, &events)
        });
        Ok(Server { accepting: Some(accepting.map_err(failed)?), listener, events })
    }

    /// How many clients are connected.
    pub fn clients(&self) -> usize {
        self.events.connected().count()
    }

    /// Waits until all answers and events are written, but not longer than `limit`; whether they are. Call it before the process ends.
    pub fn flush(&self, limit: Duration) -> bool {
        self.events.unsent().wait_for_none(limit)
    }

    /// Waits until no client is connected, but not longer than `limit`; whether there is none. For the end of a migration: a client that
    /// polls is to see it.
    pub fn wait_for_clients_to_leave(&self, limit: Duration) -> bool {
        self.events.connected().wait_for_none(limit)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.listener.close();
        // Before the clients are disconnected, so that none comes in behind.
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        self.events.disconnect_all();
    }
}

fn accept_clients(listener: &PathListener, handler: &Arc<dyn Handler>, events: &Events) {
    while let Ok(stream) = listener.accept() {
        if events.connected().count() < MAX_CLIENTS {
            // A client that cannot be given its threads is disconnected by the drop of its stream; the others go on.
            let _ = start_client(stream, handler.clone(), events.clone());
        }
    }
}

fn start_client(stream: UnixStream, handler: Arc<dyn Handler>, events: Events) -> std::io::Result<()> {
    let writing = stream.try_clone()?;
    let (client, messages, connected) = events.add_client(stream.try_clone()?);
    let reader = thread::Builder::new().name("qmp-client".into()).spawn({
        let (client, events) = (client.clone(), events.clone());
        move || {
            session::serve(stream, &client, &events, &*handler);
            events.remove_client(&client);
        }
    });
    let writer = thread::Builder::new().name("qmp-writer".into()).spawn(move || {
        session::write_messages(writing, messages);
        drop(connected);
    });
    if reader.is_err() || writer.is_err() {
        events.remove_client(&client);
    }
    reader.and(writer).map(drop)
}
