//! Sockets, and a thread for each client.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::Socket;

use super::catalogue::{Catalogue, Disconnect};
use super::negotiation::{Offer, negotiate};
use super::server::{ServerAddress, ServerError};
use super::transmission::serve;
use crate::qmp::socket::{PathListener, is_transient};

/// How long a handshake may take, as in QEMU (`NBD_DEFAULT_HANDSHAKE_MAX_SECS`).
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// Clients at a time where nobody set another limit: each is a thread and a buffer of 1 MiB.
const MAX_CLIENTS: usize = 128;
/// How long to leave the system alone when it has no file descriptor or memory for a client.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

enum Listener {
    Unix(PathListener),
    Tcp(TcpListener),
}

impl Listener {
    fn bind(address: &ServerAddress) -> Result<Self, ServerError> {
        match address {
            ServerAddress::Unix { path } => Ok(Listener::Unix(PathListener::bind(path)?)),
            ServerAddress::Inet { host, port } => {
                let bound = TcpListener::bind((host.trim_matches(['[', ']']), *port));
                bound.map(Listener::Tcp).map_err(|source| ServerError::Listen { host: host.clone(), port: *port, source })
            }
        }
    }

    /// Waits for the next client; an error once [`Listener::close`] was called.
    fn accept(&self) -> io::Result<Socket> {
        match self {
            Listener::Unix(listener) => listener.accept().map(Socket::from),
            Listener::Tcp(listener) => loop {
                match listener.accept() {
                    Err(error) if is_transient(&error) => std::thread::sleep(RETRY_PAUSE),
                    accepted => {
                        let socket = Socket::from(accepted?.0);
                        // Only a client that has gone again can be in the way of either; the next read tells. One whose host has gone
                        // without a word must not take up a place for ever.
                        let _ = socket.set_tcp_nodelay(true).and(socket.set_keepalive(true));
                        return Ok(socket);
                    }
                }
            },
        }
    }

    fn close(&self) {
        match self {
            Listener::Unix(listener) => listener.close(),
            Listener::Tcp(listener) => drop(rustix::net::shutdown(listener, rustix::net::Shutdown::Both)),
        }
    }
}

/// A listening socket and its clients. Dropping it ends all of them; requests in flight end in their time.
pub(super) struct Listening {
    listener: Arc<Listener>,
    clients: Arc<Clients>,
    accepting: Option<JoinHandle<()>>,
}

impl Listening {
    /// Listens for at most `max_connections` clients at a time; further ones wait to be let in.
    pub(super) fn start(address: &ServerAddress, max_connections: Option<usize>, catalogue: Arc<Catalogue>) -> Result<Self, ServerError> {
        let listener = Arc::new(Listener::bind(address)?);
        let clients = Arc::new(Clients { limit: max_connections.unwrap_or(MAX_CLIENTS), ..Clients::default() });
        let accept = {
            let (listener, clients) = (listener.clone(), clients.clone());
            move || accept_clients(&listener, &clients, &catalogue)
        };
        let accepting = std::thread::Builder::new().name("nbd".into()).spawn(accept).map_err(ServerError::Thread)?;
        Ok(Listening { listener, clients, accepting: Some(accepting) })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.clients.close();
        self.listener.close();
        // Before the clients are disconnected, so that none comes in behind.
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        self.clients.disconnect_all();
    }
}

fn accept_clients(listener: &Listener, clients: &Arc<Clients>, catalogue: &Arc<Catalogue>) {
    while clients.wait_for_place() {
        let Ok(socket) = listener.accept() else { return };
        let client = Client::new(clients, socket);
        let catalogue = catalogue.clone();
        // A client that cannot be given its thread is disconnected by the drop of its socket; the others go on.
        let _ = std::thread::Builder::new().name("nbd-client".into()).spawn(move || client.run(&catalogue));
    }
}

/// The clients that are connected, each with how to end it.
#[derive(Default)]
struct Clients {
    limit: usize,
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    connected: Vec<(u64, Disconnect)>,
    next: u64,
    closed: bool,
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until one more client may come; false if none may any more.
    fn wait_for_place(&self) -> bool {
        let full = |state: &mut State| state.connected.len() >= self.limit && !state.closed;
        !self.left.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner).closed
    }

    fn close(&self) {
        self.lock().closed = true;
        self.left.notify_all();
    }

    fn disconnect_all(&self) {
        self.lock().connected.iter().for_each(|(_, disconnect)| disconnect());
    }
}

/// A connected client; it leaves when this is dropped.
struct Client {
    clients: Arc<Clients>,
    id: u64,
    socket: Arc<Socket>,
    disconnect: Disconnect,
}

impl Client {
    fn new(clients: &Arc<Clients>, socket: Socket) -> Self {
        let socket = Arc::new(socket);
        let disconnect: Disconnect = {
            let socket = socket.clone();
            // Fails only where the client has gone.
            Arc::new(move || drop(socket.shutdown(Shutdown::Both)))
        };
        let mut state = clients.lock();
        let id = state.next;
        state.next += 1;
        state.connected.push((id, disconnect.clone()));
        drop(state);
        Client { clients: clients.clone(), id, socket, disconnect }
    }

    /// Serves the client until it goes. How a connection ends is the client's own affair.
    fn run(self, catalogue: &Arc<Catalogue>) {
        let offer = Offer { catalogue, multi_conn: self.clients.limit > 1 };
        let mut handshake = Handshake { socket: &self.socket, deadline: Instant::now() + HANDSHAKE_LIMIT };
        if let Ok(Some(session)) = negotiate(&mut handshake, &offer, &self.disconnect)
            && self.socket.set_read_timeout(None).and_then(|()| self.socket.set_write_timeout(None)).is_ok()
        {
            let _ = serve(&mut &*self.socket, &session);
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The catalogue may hold the socket for a moment longer.
        (self.disconnect)();
        self.clients.lock().connected.retain(|(id, _)| *id != self.id);
        self.clients.left.notify_all();
    }
}

/// A client's socket until a deadline for everything together.
struct Handshake<'a> {
    socket: &'a Socket,
    deadline: Instant,
}

impl Handshake<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Handshake<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(buffer)
    }
}

impl Write for Handshake<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
