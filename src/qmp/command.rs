//! The commands of the control socket: QEMU's names and arguments, for what Ferry has.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::block_export::{BlockExportAdd, BlockExportDel, NbdServerStart};
use super::capabilities::CapabilityStatus;
use super::error::QmpError;
use super::parameters::MigrateSetParameters;
pub use super::transaction::{
    BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockDirtyBitmapMergeSource, BlockSnapshot, Transaction,
    TransactionAction,
};
use crate::migrate::report::Status;

/// Declares an enum of commands together with their names on the wire and the way to read their arguments.
macro_rules! commands {
    ($(#[$doc:meta])* $vis:vis enum $enum:ident {
        $($(#[$variant_doc:meta])* $name:literal => $variant:ident $(($arguments:ty))?,)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Serialize)]
        #[serde(tag = "execute", content = "arguments")]
        $vis enum $enum {
            $($(#[$variant_doc])* #[serde(rename = $name)] $variant $(($arguments))?,)*
        }

        impl $enum {
            /// The commands' names on the wire.
            pub const NAMES: &'static [&'static str] = &[$($name),*];

            /// The command `name` with its `arguments`, or nothing when the table has no such name. Arguments that are missing, unknown
            /// or of the wrong type are errors, as in QEMU.
            pub fn parse(name: &str, arguments: &Map<String, Value>) -> Option<Result<Self, QmpError>> {
                match name {
                    $($name => Some(commands!(@parse arguments, $name, $variant $(, $arguments)?)),)*
                    _ => None,
                }
            }
        }
    };
    (@parse $map:ident, $name:literal, $variant:ident) => {
        read_arguments::<NoArguments>($name, $map).map(|NoArguments {}| Self::$variant)
    };
    (@parse $map:ident, $name:literal, $variant:ident, $arguments:ty) => {
        read_arguments::<$arguments>($name, $map).map(Self::$variant)
    };
}

commands! {
    /// Commands that the server answers by itself.
    pub enum ProtocolCommand {
        /// Ends the negotiation; all other commands and events come after it.
        "qmp_capabilities" => Capabilities(EnableCapabilities),
        /// Ferry's version.
        "query-version" => QueryVersion,
        /// The names of all commands.
        "query-commands" => QueryCommands,
    }
}

commands! {
    /// Commands about the guest, for the [`Handler`](super::Handler).
    pub enum Command {
        /// Whether the guest runs: answered with [`StatusInfo`](super::response::StatusInfo).
        "query-status" => QueryStatus,
        /// Pauses the guest.
        "stop" => Stop,
        /// Resumes the guest.
        "cont" => Cont,
        /// Ends Ferry at once.
        "quit" => Quit,
        /// Asks the guest to power off, as the power button does.
        "system_powerdown" => SystemPowerdown,
        /// Begins a migration; answered as soon as it is under way.
        "migrate" => Migrate(Migrate),
        /// Tells a waiting destination where to listen.
        "migrate-incoming" => MigrateIncoming(MigrateIncoming),
        /// Switches a running precopy to postcopy.
        "migrate-start-postcopy" => MigrateStartPostcopy,
        /// Ends a migration before its commit; the guest goes on at the source.
        "migrate_cancel" => MigrateCancel,
        /// Lets a migration go on that waits before the switch.
        "migrate-continue" => MigrateContinue(MigrateContinue),
        /// Breaks the link of a postcopy on purpose.
        "migrate-pause" => MigratePause,
        /// Tells the destination of a paused postcopy where to listen for its source.
        "migrate-recover" => MigrateRecover(MigrateIncoming),
        /// Where the migration stands: answered with [`query_migrate`](super::query_migrate::query_migrate).
        "query-migrate" => QueryMigrate,
        /// Switches capabilities on or off.
        "migrate-set-capabilities" => MigrateSetCapabilities(MigrateSetCapabilities),
        /// Answered with [`MigrateCapabilities::list`](super::capabilities::MigrateCapabilities::list).
        "query-migrate-capabilities" => QueryMigrateCapabilities,
        /// Sets some of the parameters, now or during a migration.
        "migrate-set-parameters" => MigrateSetParameters(Box<MigrateSetParameters>),
        /// Answered with [`MigrateParameters`](super::parameters::MigrateParameters).
        "query-migrate-parameters" => QueryMigrateParameters,
        /// The disks and their dirty bitmaps: answered with a list of [`BlockInfo`](super::response::BlockInfo).
        "query-block" => QueryBlock,
        /// Gives a disk a dirty bitmap.
        "block-dirty-bitmap-add" => BlockDirtyBitmapAdd(BlockDirtyBitmapAdd),
        /// Removes a disk's dirty bitmap.
        "block-dirty-bitmap-remove" => BlockDirtyBitmapRemove(BlockDirtyBitmap),
        /// Clears all bits of a disk's dirty bitmap.
        "block-dirty-bitmap-clear" => BlockDirtyBitmapClear(BlockDirtyBitmap),
        /// Makes a dirty bitmap record writes again.
        "block-dirty-bitmap-enable" => BlockDirtyBitmapEnable(BlockDirtyBitmap),
        /// Makes a dirty bitmap ignore writes.
        "block-dirty-bitmap-disable" => BlockDirtyBitmapDisable(BlockDirtyBitmap),
        /// Marks in a dirty bitmap what is dirty in others.
        "block-dirty-bitmap-merge" => BlockDirtyBitmapMerge(BlockDirtyBitmapMerge),
        /// Several actions at one moment, all or none.
        "transaction" => Transaction(Transaction),
        /// The disks once more: answered with a list of [`BlockDeviceInfo`](super::response::BlockDeviceInfo).
        "query-named-block-nodes" => QueryNamedBlockNodes(QueryNamedBlockNodes),
        /// The hash of a dirty bitmap's bits, to compare it by: answered with
        /// [`BlockDirtyBitmapSha256`](super::response::BlockDirtyBitmapSha256).
        "x-debug-block-dirty-bitmap-sha256" => BlockDirtyBitmapSha256(BlockDirtyBitmap),
        /// Listens for NBD's clients.
        "nbd-server-start" => NbdServerStart(NbdServerStart),
        /// Disconnects all NBD clients and removes all exports.
        "nbd-server-stop" => NbdServerStop,
        /// Offers a disk to NBD's clients.
        "block-export-add" => BlockExportAdd(BlockExportAdd),
        /// Removes an export.
        "block-export-del" => BlockExportDel(BlockExportDel),
        /// The exports: answered with a list of QEMU's `BlockExportInfo`.
        "query-block-exports" => QueryBlockExports,
        /// Freezes a point in time of a disk, for exports. Ferry's own.
        "block-snapshot-add" => BlockSnapshotAdd(BlockSnapshot),
        /// Removes a frozen point in time. Ferry's own.
        "block-snapshot-remove" => BlockSnapshotRemove(BlockSnapshot),
    }
}

/// Arguments of a command that has none.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoArguments {}

/// Arguments of `qmp_capabilities`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnableCapabilities {
    /// Capabilities of the protocol to enable; the greeting offers none.
    #[serde(default)]
    pub enable: Vec<String>,
}

/// Arguments of `migrate`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// `tcp:HOST:PORT` or `unix:PATH` of a `ferry receive`.
    pub uri: String,
    /// Accepted and ignored, as in QEMU: the command never waits for the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detach: Option<bool>,
    /// Recover a paused postcopy instead of beginning a migration.
    #[serde(default)]
    pub resume: bool,
}

/// Arguments of `migrate-incoming` and `migrate-recover`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateIncoming {
    /// `tcp:HOST:PORT` or `unix:PATH` to listen on.
    pub uri: String,
}

/// Arguments of `migrate-continue`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateContinue {
    /// The status in which the migration waits: `pre-switchover` is the only one that ends by this command.
    pub state: Status,
}

/// Arguments of `migrate-set-capabilities`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateSetCapabilities {
    /// What to switch on or off.
    pub capabilities: Vec<CapabilityStatus>,
}

/// Arguments of `query-named-block-nodes`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryNamedBlockNodes {
    /// Accepted and ignored: a disk's image has no backing file that could be left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flat: Option<bool>,
}

fn read_arguments<T: DeserializeOwned>(command: &str, arguments: &Map<String, Value>) -> Result<T, QmpError> {
    T::deserialize(arguments).map_err(|error| QmpError::generic(format!("arguments of '{command}': {error}")))
}

#[cfg(test)]
mod tests;
