//! The control socket. It speaks QMP (QEMU's docs/interop/qmp-spec.rst): QEMU's clients and scripts drive Ferry as they drive QEMU.

pub mod block_export;
pub mod capabilities;
pub mod client;
pub mod command;
pub mod error;
pub mod event;
mod events;
mod gauge;
pub mod parameters;
pub mod query_migrate;
pub mod request;
pub mod response;
mod server;
mod session;
pub mod socket;
pub mod splitter;
mod transaction;

pub use command::Command;
pub use error::QmpError;
pub use event::Event;
pub use events::Events;
pub use server::Server;

/// Who carries out the commands.
pub trait Handler: Send + Sync {
    /// Carries out `command` and answers with its `return` value: an empty object where QEMU has one. Called on the client's thread, by
    /// several clients at once; a slow command delays nobody but its client.
    fn execute(&self, command: Command) -> Result<serde_json::Value, QmpError>;
}
