//! The oracle: sees both hosts and the truth, and judges how it ended.

use ferry::migrate::report::Status;

use super::{Right, World, all_pages};

/// How a world ended, as the oracle sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The destination runs all of the guest.
    Moved,
    /// The destination runs all of the guest, without its dirty bitmaps, because the source is dead.
    MovedWithoutBitmaps,
    /// The source runs all of the guest, and a retry may be made.
    Stayed,
    /// The source holds all of the guest, which cannot run there, and says so; a retry may be made.
    StayedPaused,
    /// The guest ended by itself at the source.
    GuestEnded,
    /// The source died with the guest before the commit.
    DiedWithSource,
    /// After the commit a side died that the guest could not do without.
    LostAfterCommit,
    /// After the commit the link was lost, and nobody joins the two again.
    Paused,
}

impl World {
    // --- the oracle ---

    pub(super) fn check_runners(&self) -> Result<(), String> {
        let runs = |alive: bool, right: Right| alive && right == Right::Running;
        if runs(self.source.alive, self.source.right) && runs(self.destination.alive, self.destination.right) {
            return Err("two runners".into());
        }
        Ok(())
    }

    pub(super) fn judge(&self) -> Result<Option<Ending>, String> {
        let (source, destination) = (&self.source, &self.destination);
        if source.alive && destination.alive && source.engine.is_paused() && self.plan.patience == 0 {
            return Ok(Some(Ending::Paused));
        }
        if source.alive && source.right == Right::GivenUp && destination.alive && destination.outcome.is_some() && !destination.whole {
            return Err("the guest was given up at either side".into());
        }
        // Without a destination nothing comes of a recovery.
        let source_over = !source.alive || source.outcome.is_some() || (source.engine.is_paused() && !destination.alive);
        if !source_over || !self.is_destination_over() {
            return Ok(None);
        }
        if destination.alive && destination.whole {
            self.check_whole("destination, at the end,")?;
            if destination.bitmap.abandoned && source.alive {
                return Err("the bitmap was dropped though the source lives".into());
            }
            return Ok(Some(if destination.bitmap.abandoned { Ending::MovedWithoutBitmaps } else { Ending::Moved }));
        }
        match (source.alive, source.right) {
            (true, Right::Running | Right::Paused | Right::Ended) => {
                if source.throttle != 0 {
                    return Err("the guest stayed and is slowed down".into());
                }
                for page in all_pages(&self.plan.layout()) {
                    self.check_read(page, source.ram.read(page), "source, at the end,")?;
                }
                if destination.alive && destination.engine.is_committed() {
                    return Err("the destination has a guest that stayed".into());
                }
                let error = source.outcome.as_ref().and_then(|outcome| outcome.report().error.as_deref()).unwrap_or_default();
                match source.right {
                    Right::Ended => Ok(Some(Ending::GuestEnded)),
                    Right::Running => Ok(Some(Ending::Stayed)),
                    _ if source.resume_failed && error.contains("stays paused at the source") => Ok(Some(Ending::StayedPaused)),
                    _ => Err(format!("the guest stands still at the source for ever: {error}")),
                }
            }
            _ if source.alive && destination.alive => Err("the guest is lost though both sides live".into()),
            (_, Right::GivenUp) => Ok(Some(Ending::LostAfterCommit)),
            _ if destination.alive && destination.right == Right::Running => Err("two runners".into()),
            _ => Ok(Some(Ending::DiedWithSource)),
        }
    }

    /// Whether nothing will happen at the destination any more.
    fn is_destination_over(&self) -> bool {
        let destination = &self.destination;
        if !destination.alive {
            return true;
        }
        let silent = destination.main().is_none() && destination.readers.is_empty() && self.connections.iter().all(|link| link.greeted);
        if !destination.placing.is_empty() {
            return false;
        }
        if destination.outcome.is_some() || (silent && destination.engine.status() == Status::None) {
            return true;
        }
        // Without its source it lacks what it lacks.
        let is_lost = destination.engine.lost().is_some() && silent;
        is_lost && (destination.whole || (!self.source.alive && !destination.engine.missing().is_empty()))
    }

    /// All that the guest has written, and all that its disks' bitmaps have recorded, is at the destination.
    pub(super) fn check_whole(&self, when: &str) -> Result<(), String> {
        for page in all_pages(&self.plan.layout()) {
            self.check_read(page, self.destination.ram.read(page), when)?;
        }
        let bitmap = &self.destination.bitmap;
        if !bitmap.abandoned && (!bitmap.complete || bitmap.loaded != self.bits) {
            return Err(format!("the bitmap is wrong at the {when} complete: {}", bitmap.complete));
        }
        Ok(())
    }
}
