//! What QMP starts, stops, adds and removes.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use super::catalogue::{Catalogue, ExportError, ExportInfo, RemoveMode};
use super::export::Export;
use super::listening::Listening;
use crate::qmp::socket::SocketError;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerAddress {
    /// A unix socket, which only its owner can connect to.
    Unix {
        /// Its path.
        path: PathBuf,
    },
    /// A TCP port, which everybody who reaches it can connect to.
    Inet {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
}

/// Why the server does not do what it was asked to; QEMU's words where it has some.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ServerError {
    #[error("NBD server already running")]
    Running,
    #[error("NBD server not running")]
    NotRunning,
    #[error("{what} '{text}' too long")]
    TooLong { what: &'static str, text: String },
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("cannot listen on {host}:{port}: {source}")]
    Listen { host: String, port: u16, source: std::io::Error },
    #[error("cannot start a thread for the NBD server: {0}")]
    Thread(std::io::Error),
}

/// The NBD server of a process: listening or not, with exports while it listens.
pub struct NbdServer {
    catalogue: Arc<Catalogue>,
    listening: Mutex<Option<Listening>>,
}

impl NbdServer {
    /// Not listening; `deleted` is called with the id of each export when it is gone.
    pub fn new(deleted: impl Fn(&str) + Send + Sync + 'static) -> Self {
        NbdServer { catalogue: Catalogue::new(deleted), listening: Mutex::default() }
    }

    /// Listens for at most `max_connections` clients at a time; nothing is for the default of 128.
    pub fn start(&self, address: &ServerAddress, max_connections: Option<usize>) -> Result<(), ServerError> {
        let mut listening = self.listening();
        if listening.is_some() {
            return Err(ServerError::Running);
        }
        *listening = Some(Listening::start(address, max_connections, self.catalogue.clone())?);
        Ok(())
    }

    /// Disconnects all clients and removes all exports.
    pub fn stop(&self) -> Result<(), ServerError> {
        let mut listening = self.listening();
        drop(listening.take().ok_or(ServerError::NotRunning)?);
        self.catalogue.remove_all();
        Ok(())
    }

    /// Offers an export to clients.
    pub fn add(&self, export: Export) -> Result<(), ServerError> {
        let listening = self.listening();
        if listening.is_none() {
            return Err(ServerError::NotRunning);
        }
        let description = export.description.as_deref().unwrap_or_default();
        for (what, text) in [("export name", export.name.as_str()), ("description", description)] {
            if text.len() > Export::MAX_STRING {
                return Err(ServerError::TooLong { what, text: text.to_owned() });
            }
        }
        Ok(self.catalogue.add(export)?)
    }

    /// Removes an export.
    pub fn remove(&self, id: &str, mode: RemoveMode) -> Result<(), ServerError> {
        Ok(self.catalogue.remove(id, mode)?)
    }

    /// Every export.
    pub fn exports(&self) -> Vec<ExportInfo> {
        self.catalogue.info()
    }

    fn listening(&self) -> MutexGuard<'_, Option<Listening>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
