//! What the driver tells the destination.

use crate::migrate::wire::{Channel, Frame};

/// What the driver tells the destination.
#[derive(Clone, Debug)]
pub enum Input {
    /// A frame came on a connection, `Hello` and `Pages` excepted.
    Frame(Channel, Frame),
    /// The host can run the guest and RAM of the asked size is there: the answer to [`Action::Prepare`].
    Prepared,
    /// The package is loaded: the answer to [`Action::Load`].
    Loaded {
        /// How long it took, in microseconds.
        load_us: u64,
        /// What went wrong without harming the guest.
        warnings: Vec<String>,
    },
    /// The vCPUs run: the answer to [`Action::Run`], with the time it took in microseconds.
    Ran(u64),
    /// Something could not be done here, said so that the person at the source understands it.
    Failed(String),
    /// Something went wrong that does not harm the guest; the person at the source is told at the end.
    Warning(String),
    /// A connection is gone.
    Lost(Channel, String),
}
