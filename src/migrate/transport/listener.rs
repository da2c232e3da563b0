//! Waiting for the other side to connect.

use std::fs;
use std::io;
use std::net::ToSocketAddrs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::event::PollFlags;
use socket2::{Domain, SockAddr, Socket, Type};

use super::interrupt::Wait;
use super::{Address, Connection, Interrupt, TransportError};

/// A migration has few connections, and they come one after the other.
const BACKLOG: i32 = 16;

/// A bound, listening socket. A Unix socket's file is removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
    file: Option<SocketFile>,
}

/// The file that our own socket made, told from a successor by its inode.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Listener {
    /// Listens on `address`. A Unix socket that nobody listens on any more is replaced; any other file is left alone.
    pub fn bind(address: &Address) -> Result<Self, TransportError> {
        let error = |source| TransportError::Listen { address: address.clone(), source };
        let (socket, file) = match address {
            Address::Tcp { host, port } => (bind_tcp(address, host, *port)?, None),
            Address::Unix(path) => {
                remove_stale(path)?;
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(error)?;
                socket.bind(&SockAddr::unix(path).map_err(error)?).map_err(error)?;
                let inode = fs::symlink_metadata(path).map_err(error)?.ino();
                (socket, Some(SocketFile { path: path.clone(), inode }))
            }
        };
        // From here on a failure removes the file again.
        let mut listener = Listener { socket, address: address.clone(), file };
        listener.socket.set_nonblocking(true).map_err(error)?;
        listener.socket.listen(BACKLOG).map_err(error)?;
        if let (Address::Tcp { port, .. }, Some(bound)) = (&mut listener.address, listener.socket.local_addr().map_err(error)?.as_socket())
        {
            *port = bound.port();
        }
        Ok(listener)
    }

    /// Where it listens; a port that the kernel chose is filled in.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for the next connection. `interrupt` will also end the waits of the connection itself.
    pub fn accept(&self, interrupt: &Interrupt, deadline: Option<Instant>) -> Result<Connection, TransportError> {
        let error = |source| TransportError::Accept { address: self.address.clone(), source };
        loop {
            match interrupt.wait_for(&self.socket, PollFlags::IN, deadline).map_err(error)? {
                Wait::Ready => {}
                Wait::TimedOut => return Err(TransportError::TimedOut(self.address.clone())),
                Wait::Interrupted => return Err(TransportError::Interrupted),
            }
            match self.socket.accept() {
                Ok((socket, peer)) => {
                    let name = peer.as_socket().map_or_else(|| self.address.to_string(), |peer| peer.to_string());
                    return Connection::new(socket, name, interrupt.clone()).map_err(error);
                }
                // It was there when the wait ended and has gone since.
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {
                }
                Err(e) => return Err(error(e)),
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.file
            && fs::symlink_metadata(&file.path).is_ok_and(|found| found.ino() == file.inode)
        {
            let _ = fs::remove_file(&file.path);
        }
    }
}

fn bind_tcp(address: &Address, host: &str, port: u16) -> Result<Socket, TransportError> {
    let resolved = (host, port).to_socket_addrs().map_err(|source| TransportError::Resolve { address: address.clone(), source })?;
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in resolved {
        let bound = Socket::new(Domain::for_address(candidate), Type::STREAM, None).and_then(|socket| {
            // So that a port can be listened on again right after a connection on it has ended.
            socket.set_reuse_address(true)?;
            socket.bind(&candidate.into())?;
            Ok(socket)
        });
        match bound {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(TransportError::Listen { address: address.clone(), source: last })
}

/// Removes the socket at `path` if nobody listens on it.
fn remove_stale(path: &Path) -> Result<(), TransportError> {
    let error = |source| TransportError::Listen { address: Address::Unix(path.to_owned()), source };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(error(e)),
        Ok(found) if !found.file_type().is_socket() => return Err(TransportError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(error)?;
    // Someone whose queue is full is alive too, and must not make this wait.
    probe.set_nonblocking(true).map_err(error)?;
    match probe.connect(&SockAddr::unix(path).map_err(error)?) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(error),
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(error(e)),
        _ => Err(TransportError::Live(path.to_owned())),
    }
}
