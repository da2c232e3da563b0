//! The oracle: sees both hosts and the truth, and judges how it ended.

use ferry::memory::PageNumber;
use ferry::migrate::{destination, source};

use super::{Right, World};
use crate::link::{CHANNELS, index};

/// How a world ended, as the oracle sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The destination runs all of the guest.
    Moved,
    /// The source runs all of the guest, and a retry may be made.
    Stayed,
    /// The source died with the guest before the commit.
    DiedWithSource,
    /// After the commit a side or the link was lost.
    LostAfterCommit,
}

impl World {
    // --- the oracle ---

    pub(super) fn judge(&mut self) -> Result<Option<Ending>, String> {
        let quiet = CHANNELS.iter().all(|channel| self.link.to_destination[index(*channel)].is_empty());
        let (source, destination) = (&self.source, &self.destination);
        let source_ended = !source.alive || source.outcome.is_some();
        let destination_ended = !destination.alive || destination.outcome.is_some();
        if !(source_ended && destination_ended) || (destination.alive && !destination.placing.is_empty() && quiet) {
            // A source whose destination died before it connected hears of it from the link; give it its time.
            return Ok(None);
        }
        let completed = matches!(source.outcome, Some(source::Outcome::Completed(_)));
        if completed && destination.alive && destination.outcome != Some(destination::Outcome::Completed) {
            return Err("the source says it is done, and the destination does not".into());
        }
        if destination.alive && destination.outcome == Some(destination::Outcome::Completed) {
            for page in 0..self.plan.pages {
                self.check_read(PageNumber(page), destination.ram.read(PageNumber(page)), "destination, at the end,")?;
            }
            let bitmap = &destination.bitmap;
            if !bitmap.abandoned && bitmap.loaded != self.bits {
                return Err("the bitmap is wrong".into());
            }
            if completed && bitmap.abandoned {
                return Err("the bitmap was dropped though the source is done".into());
            }
            return Ok(Some(Ending::Moved));
        }
        match (source.alive, source.right) {
            (true, Right::Running) => {
                for page in 0..self.plan.pages {
                    self.check_read(PageNumber(page), source.ram.read(PageNumber(page)), "source, at the end,")?;
                }
                if destination.alive && destination.right == Right::Running {
                    return Err("two runners".into());
                }
                Ok(Some(Ending::Stayed))
            }
            (true, Right::Paused) => Err("the guest stands still at the source for ever".into()),
            (true, _) => Ok(Some(Ending::LostAfterCommit)),
            (false, Right::GivenUp) => Ok(Some(Ending::LostAfterCommit)),
            (false, _) if destination.alive && destination.right == Right::Running => Err("two runners".into()),
            (false, _) => Ok(Some(Ending::DiedWithSource)),
        }
    }
}
