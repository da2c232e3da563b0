//! Connections between the two sides: TCP or Unix sockets whose every wait can be ended from another thread.

mod address;
mod connection;
mod interrupt;
mod listener;

pub use address::{Address, AddressError};
pub use connection::{Awaited, Closer, Connection, LinkError, Reader, Writer, connect};
pub use interrupt::{Interrupt, Wake};
pub use listener::Listener;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum TransportError {
    /// A host name has no address.
    #[error("cannot resolve {address}: {source}")]
    Resolve {
        /// Where to.
        address: Address,
        /// What the resolver said.
        source: io::Error,
    },
    /// The listening socket could not be made.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: Address,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another process listens on the Unix socket.
    #[error("cannot listen on unix:{}: another process does", .0.display())]
    Live(PathBuf),
    /// The path names something that is not a socket, and is not Ferry's to remove.
    #[error("cannot listen on unix:{}: the file exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Nobody could be accepted.
    #[error("cannot accept a connection on {address}: {source}")]
    Accept {
        /// Where.
        address: Address,
        /// What the kernel said.
        source: io::Error,
    },
    /// The other side could not be reached.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// Where to.
        address: Address,
        /// What the kernel said.
        source: io::Error,
    },
    /// The deadline passed first.
    #[error("no connection with {0} in time")]
    TimedOut(Address),
    /// [`Interrupt::raise`] was called.
    #[error("interrupted while waiting for a connection")]
    Interrupted,
}

#[cfg(test)]
mod tests;
