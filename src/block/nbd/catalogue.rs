//! The exports, and who uses them.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use super::export::Export;

/// Ends a client's connection, from any thread.
pub type Disconnect = Arc<dyn Fn() + Send + Sync>;

/// How to remove an export (QEMU's `BlockExportRemoveMode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RemoveMode {
    /// Only if nobody uses it.
    #[default]
    Safe,
    /// Disconnect whoever uses it.
    Hard,
}

/// Why an export cannot be added or removed; QEMU's words.
#[derive(Debug, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ExportError {
    #[error("Block export id '{0}' is already in use")]
    IdInUse(String),
    #[error("NBD server already has export named '{0}'")]
    NameInUse(String),
    #[error("Export '{0}' is not found")]
    NotFound(String),
    #[error("export '{0}' still in use; use mode 'hard' to disconnect its clients")]
    StillInUse(String),
    #[error("Export '{0}' is already shutting down")]
    ShuttingDown(String),
}

/// An export as `query-block-exports` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its id.
    pub id: String,
    /// What it exports.
    pub node: String,
    /// Whether it only waits for its last client to be gone.
    pub shutting_down: bool,
}

struct Entry {
    export: Arc<Export>,
    clients: Vec<(u64, Disconnect)>,
    shutting_down: bool,
}

/// All exports.
pub struct Catalogue {
    entries: Mutex<(Vec<Entry>, u64)>,
    deleted: Box<dyn Fn(&str) + Send + Sync>,
}

impl Catalogue {
    /// No exports; `deleted` is called with the id of each when it is gone.
    pub fn new(deleted: impl Fn(&str) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Catalogue { entries: Mutex::default(), deleted: Box::new(deleted) })
    }

    /// Adds an export.
    pub fn add(&self, export: Export) -> Result<(), ExportError> {
        let entries = &mut self.lock().0;
        if entries.iter().any(|entry| entry.export.id == export.id) {
            return Err(ExportError::IdInUse(export.id));
        }
        // The name of one that shuts down is free.
        if entries.iter().any(|entry| entry.export.name == export.name && !entry.shutting_down) {
            return Err(ExportError::NameInUse(export.name));
        }
        entries.push(Entry { export: Arc::new(export), clients: Vec::new(), shutting_down: false });
        Ok(())
    }

    /// Removes an export. Where it has clients, it is gone when the request that each has in flight is done.
    pub fn remove(&self, id: &str, mode: RemoveMode) -> Result<(), ExportError> {
        let entries = &mut self.lock().0;
        let entry = entries.iter_mut().find(|entry| entry.export.id == id).ok_or_else(|| ExportError::NotFound(id.to_owned()))?;
        if entry.shutting_down {
            return Err(ExportError::ShuttingDown(id.to_owned()));
        }
        if mode == RemoveMode::Safe && !entry.clients.is_empty() {
            return Err(ExportError::StillInUse(id.to_owned()));
        }
        self.shut_down(entries, |export| export.id == id);
        Ok(())
    }

    /// Removes all exports, and disconnects whoever uses them.
    pub fn remove_all(&self) {
        self.shut_down(&mut self.lock().0, |_| true);
    }

    /// Every export, in the order they were added.
    pub fn info(&self) -> Vec<ExportInfo> {
        let describe =
            |entry: &Entry| ExportInfo { id: entry.export.id.clone(), node: entry.export.node.clone(), shutting_down: entry.shutting_down };
        self.lock().0.iter().map(describe).collect()
    }

    /// What clients are offered.
    pub fn list(&self) -> Vec<Arc<Export>> {
        self.lock().0.iter().filter(|entry| !entry.shutting_down).map(|entry| entry.export.clone()).collect()
    }

    /// The export of this name, for a look at it.
    pub fn find(&self, name: &str) -> Option<Arc<Export>> {
        self.list().into_iter().find(|export| export.name == name)
    }

    /// The export of this name, in use until the value is dropped or `disconnect` was called.
    pub fn attach(self: &Arc<Self>, name: &str, disconnect: Disconnect) -> Option<Attached> {
        let (entries, next) = &mut *self.lock();
        let entry = entries.iter_mut().find(|entry| entry.export.name == name && !entry.shutting_down)?;
        let client = *next;
        *next += 1;
        entry.clients.push((client, disconnect));
        Some(Attached { catalogue: self.clone(), export: entry.export.clone(), client })
    }

    fn shut_down(&self, entries: &mut Vec<Entry>, which: impl Fn(&Export) -> bool) {
        for entry in entries.iter_mut().filter(|entry| which(&entry.export)) {
            entry.shutting_down = true;
            entry.clients.iter().for_each(|(_, disconnect)| disconnect());
        }
        self.forget_unused(entries);
    }

    /// Under the lock, so that nobody sees an id in use after its event.
    fn forget_unused(&self, entries: &mut Vec<Entry>) {
        entries.retain(|entry| {
            let gone = entry.shutting_down && entry.clients.is_empty();
            if gone {
                (self.deleted)(&entry.export.id);
            }
            !gone
        });
    }

    fn lock(&self) -> MutexGuard<'_, (Vec<Entry>, u64)> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Catalogue").field(&self.info()).finish()
    }
}

/// An export in use by one client.
pub struct Attached {
    catalogue: Arc<Catalogue>,
    export: Arc<Export>,
    client: u64,
}

impl Deref for Attached {
    type Target = Arc<Export>;

    fn deref(&self) -> &Arc<Export> {
        &self.export
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let entries = &mut self.catalogue.lock().0;
        for entry in entries.iter_mut().filter(|entry| Arc::ptr_eq(&entry.export, &self.export)) {
            entry.clients.retain(|(client, _)| *client != self.client);
        }
        self.catalogue.forget_unused(entries);
    }
}
