//! What the destination tells its driver to do.

use std::time::Duration;

use super::Link;
#[cfg(doc)]
use super::{Destination, Input};
use crate::block::dirty_bitmap::BitmapRun;
use crate::migrate::wire::{Channel, Frame, Package, Setup};

/// What the driver is to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Poll {
    /// Do this.
    Act(Action),
    /// Nothing until the next input, or until this time.
    Wait(Option<Duration>),
}

/// Things to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send on a connection.
    Send(Channel, Frame),
    /// Check host and disks and allocate RAM; answer with [`Input::Prepared`] or [`Input::Failed`].
    Prepare(Setup),
    /// Begin to build the machine in the background. Not before the source was told to send: it need not wait for a processor that is busy here.
    BeginBuilding,
    /// Wait until the machine is built: what is to be acknowledged next allows the source to stop the guest.
    FinishBuilding,
    /// Discard every page in `package.missing`: of some an old version is in place, and of others a zero page, because a transparent
    /// huge page came into being around a neighbour (none of which can be without [`Destination::has_received`]). Serve page faults if `package.postcopy` (before anything is restored, because
    /// restoring can fault), create the bitmaps, load the state; answer with [`Input::Loaded`].
    Load(Box<Package>),
    /// What was copied of disks is to outlive a crash of this host from now on; answer with [`Input::DisksFlushed`] or [`Input::DisksNotFlushed`].
    FlushDisks,
    /// Take the disks' locks and run the guest; answer with [`Input::Ran`].
    Run,
    /// Put words into a bitmap; where `words` is empty there is nothing to set.
    LoadBitmap {
        /// Index in the package.
        index: u32,
        /// First word.
        first: u64,
        /// The words.
        run: BitmapRun,
    },
    /// Merge the successor of this bitmap back: all bits have come.
    CompleteBitmap(u32),
    /// Drop the bitmaps that are not complete: the source will not come back. A wrong bitmap would be worse than none.
    AbandonBitmaps,
    /// Close the connections, if that was not done: this link is lost, for this reason. The guest is not, and nor is the migration.
    Disconnect(String),
    /// Take up the main connection of this link. Ask again, on its urgent connection when that has come, for all that is waited for.
    Reconnect(Link),
    /// All of the guest is here: end the watch over its memory, and make huge pages again where there were some.
    Complete,
    /// The migration is over for this side. Nothing follows.
    End(Outcome),
}

/// How it ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The guest is whole and runs here.
    Completed,
    /// The source has learned what it wanted to know, and nothing was to come. Whoever waited for a migration waits on.
    DryRun,
    /// Nothing runs here; with the reason.
    Abandoned(String),
}

/// Where the contents of pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Straight into guest RAM: nobody looks at it yet. Report it with [`Destination::received`].
    Direct,
    /// By userfaultfd, which wakes who waits; report it with [`Destination::placed`].
    Fault,
    /// Where huge pages come together; report it with [`Destination::staged`], and then look for one that has with
    /// [`Destination::take_gathered`].
    Staged,
}
