//! What the driver tells the destination.

#[cfg(doc)]
use super::Action;
use crate::migrate::wire::{Channel, Frame};

/// One of the pairs of connections that a migration has one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link(pub u32);

/// What the driver tells the destination.
#[derive(Clone, Debug)]
pub enum Input {
    /// A frame came on a connection, `Hello` and `Pages` excepted.
    Frame(Link, Channel, Frame),
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
    /// The answer to [`Action::FlushDisks`].
    DisksFlushed,
    /// The answer to [`Action::FlushDisks`] if it fails: why.
    DisksNotFlushed(String),
    /// What came on a connection of this link makes no sense, for this reason.
    Nonsense(Link, String),
    /// Something could not be done here, said so that the person at the source understands it.
    Failed(String),
    /// Something went wrong that does not harm the guest; the person at the source is told at the end.
    Warning(String),
    /// A connection is gone.
    Lost(Link, Channel, String),
    /// A person ends it, for this reason. After the commit the guest is here, and nothing comes of this; from READY on, as long as the link
    /// stands, the source is asked.
    GiveUp(String),
    /// A person breaks the link.
    Pause,
    /// A person wants no more of the source: bitmaps that are not complete are dropped. Only when all of RAM is here.
    GiveUpRest,
}
