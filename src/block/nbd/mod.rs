//! Disks for clients outside the guest, over the NBD protocol (doc/proto.md of the NetworkBlockDevice/nbd repository): fixed newstyle
//! negotiation, structured replies, block status.
//!
//! | file | concern |
//! |---|---|
//! | `protocol` | numbers and structures on the wire |
//! | `export` | what clients can do with one exported disk |
//! | `meta_context` | `base:allocation` and `qemu:dirty-bitmap:NAME` |
//! | `negotiation` | the handshake, up to the choice of an export |
//! | `transmission` | requests and their replies |
//! | `catalogue` | the exports, and who uses them |
//! | `listening` | sockets, and a thread for each client |
//! | `server` | what QMP starts, stops, adds and removes |
//! | `client` | reads an export of this server or another |

pub mod catalogue;
pub mod client;
pub mod export;
mod listening;
pub mod meta_context;
pub mod negotiation;
pub mod protocol;
pub mod server;
pub mod transmission;

use thiserror::Error;

/// Why a client's connection ends before the client ends it.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// The connection broke, or the handshake took too long.
    #[error("the connection broke: {0}")]
    Io(#[from] std::io::Error),
    /// The client does not speak the protocol; nothing it says can be understood from here on.
    #[error("the client broke the protocol: {0}")]
    Protocol(&'static str),
    /// A read failed when a part of its data was sent, and without structured replies there is no other way to tell.
    #[error("a read failed half-way")]
    HalfRead,
}

#[cfg(test)]
mod tests;
