//! What the source tells its driver to do.

use std::time::Duration;

#[cfg(doc)]
use super::{Input, Source};
use crate::block::dirty_bitmap::RunLimits;
use crate::memory::{HostPage, PageRun};
use crate::migrate::report::Report;
#[cfg(doc)]
use crate::migrate::wire::MAX_RUN;
use crate::migrate::wire::{Channel, Frame};

/// What the driver is to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Poll {
    /// Something that is not bulk data; in order.
    Act(Action),
    /// Send this in the background and report it with [`Source::sent`] or [`Source::sent_bitmap`].
    Bulk(Bulk),
    /// Wait for an input, at most until this time, and poll again.
    Wait(Option<Duration>),
}

/// Things to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Open the main connection.
    Connect,
    /// Send on the main connection.
    Send(Frame),
    /// Close the connections, if that was not done: the link is lost, the migration is not. With what to tell a person.
    Disconnect(String),
    /// Open the urgent connection and those for pages, and say [`Source::hello`] on each.
    OpenOthers,
    /// Begin to track dirty pages; answer with the pages that have ever been used as [`Input::Harvested`].
    StartTracking,
    /// Answer with [`Input::Harvested`].
    Harvest,
    /// Clear the dirty bits of all pages, so that every write from now on shows; then answer with
    /// [`Input::Harvested`](super::Input::Harvested), whatever is in it.
    Watch,
    /// Make the guest's vCPUs stand still for this percentage of the time; 0: let them run as they like.
    Throttle(u8),
    /// Pause the guest, save its state, harvest last; answer with [`Input::Stopped`].
    Stop,
    /// The guest goes on here, if it stands still: the switch did not take place.
    Resume,
    /// The commit point: give up for good the right to run the guest, and its disks' locks. What comes next is the `Commit` frame,
    /// unless it is answered with [`Input::GiveUpFailed`].
    GiveUp,
    /// The migration is over; stop tracking, close the connections. Nothing follows.
    End(Box<Outcome>),
}

/// Bulk data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bulk {
    /// Pages, as contents or as zero runs. Where `clear` is set, first clear the dirty bits of [`Source::unsent`] and of `runs` in it. What
    /// comes for one connection is to be sent in this order; sending need not be over before the next poll.
    Pages {
        /// The connection they travel on.
        channel: Channel,
        /// The pages: at most [`MAX_RUN`] in all.
        runs: Vec<PageRun>,
        /// Pages about to be sent, whose dirty bits are cleared first.
        clear: Option<PageRun>,
        /// So many neighbouring pages go alike, with contents, in one frame, or by name: in postcopy they are placed at once.
        unit: HostPage,
    },
    /// Words of a bitmap, on the main connection.
    Bitmap {
        /// Index in the package.
        index: u32,
        /// First word.
        first: u64,
        /// How many may go together, from there on.
        limits: RunLimits,
    },
}

/// How it ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The destination runs the guest and holds all of it.
    Completed(Report),
    /// The guest runs here as if nothing had been tried.
    NotMoved(Report),
}

impl Outcome {
    /// What it cost.
    pub fn report(&self) -> &Report {
        match self {
            Outcome::Completed(report) | Outcome::NotMoved(report) => report,
        }
    }
}
