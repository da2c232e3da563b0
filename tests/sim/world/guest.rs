//! The guest: writes and reads wherever it runs, and checks every read.

use ferry::memory::{PageNumber, PageRun};
use ferry::migrate::outgoing::CLEAR_CHUNK;

use super::{BITS, Right, World};
use crate::memory::Version;

/// After so many writes the guest at the source only reads: precopy alone need not converge before.
const CALM: Version = 3000;

impl World {
    // --- the guest ---

    pub(super) fn guest_step(&mut self) -> Result<(), String> {
        if self.plan.blocks > 0 && self.choices.chance(30) {
            return self.guest_uses_disk();
        }
        let page = if self.plan.pages > CLEAR_CHUNK + 4 && self.choices.chance(30) {
            // Where a run might cross the border between two chunks.
            PageNumber(CLEAR_CHUNK - 4 + self.choices.below(8))
        } else {
            PageNumber(self.choices.below(self.plan.pages))
        };
        if self.choices.chance(10) {
            let bit = self.choices.below(BITS);
            if self.source.alive && self.source.right == Right::Running {
                self.bits.insert(bit);
            } else if self.destination.alive && self.destination.right == Right::Running {
                self.bits.insert(bit);
                if self.destination.bitmap.complete {
                    self.destination.bitmap.loaded.insert(bit);
                } else {
                    self.destination.bitmap.successor.insert(bit);
                }
            }
        }
        if self.source.alive && self.source.right == Right::Running {
            self.check_read(page, self.source.ram.read(page), "source")?;
            if self.next_version > CALM {
                return Ok(());
            }
            let version = self.fresh_version();
            self.source.ram.write(page, version);
            self.truth[page.0 as usize] = version;
        } else if self.destination.alive && self.destination.right == Right::Running && self.destination.blocked.is_none() {
            if self.destination.userfault && !self.destination.ram.is_populated(page) {
                self.destination.faults.push_back(page);
                self.destination.blocked = Some(page);
                return Ok(());
            }
            self.check_read(page, self.destination.ram.read(page), "destination")?;
            let version = self.fresh_version();
            self.destination.ram.write(page, version);
            self.truth[page.0 as usize] = version;
        }
        Ok(())
    }

    /// Writes a block as a whole, which waits for nothing, or reads one.
    fn guest_uses_disk(&mut self) -> Result<(), String> {
        let Some((_, disk)) = self.plan.layout().disks().next() else { return Ok(()) };
        let block = PageNumber(disk.first.0 + self.choices.below(disk.count));
        let writes = self.choices.chance(40);
        let at_source = self.source.alive && self.source.right == Right::Running;
        let at_destination = self.destination.alive && self.destination.right == Right::Running && self.destination.blocked.is_none();
        if !at_source && !at_destination {
            return Ok(());
        }
        if writes {
            if at_source && self.next_version > CALM {
                return Ok(());
            }
            let version = self.fresh_version();
            if !at_source && self.destination.userfault && !self.destination.ram.is_populated(block) {
                self.say("guest: writes a block that has not come");
            }
            let ram = if at_source { &mut self.source.ram } else { &mut self.destination.ram };
            ram.write(block, version);
            self.truth[block.0 as usize] = version;
            return Ok(());
        }
        if at_source {
            return self.check_read(block, self.source.ram.read(block), "source");
        }
        if self.destination.userfault && !self.destination.ram.is_populated(block) {
            let count = (1 + self.choices.below(4)).min(disk.end() - block.0);
            self.say("guest: waits for a block");
            self.destination.wanted.push_back(PageRun { first: block, count });
            self.destination.blocked = Some(block);
            return Ok(());
        }
        self.check_read(block, self.destination.ram.read(block), "destination")
    }

    fn fresh_version(&mut self) -> Version {
        self.next_version += 1;
        // A guest clears pages, too.
        if self.choices.chance(10) { 0 } else { self.next_version }
    }

    pub(super) fn check_read(&self, page: PageNumber, found: Version, whose: &str) -> Result<(), String> {
        let wanted = self.truth[page.0 as usize];
        if found == wanted { Ok(()) } else { Err(format!("the guest at the {whose} read version {found} of {page} instead of {wanted}")) }
    }
}
