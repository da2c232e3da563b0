//! Memory in which huge pages of a guest come together before they are put in place.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::pagemap::Pagemap;
use super::{GRANULE, GuestRam, PageRun, RamError};

/// As much address space as guest RAM takes: a page comes where it would be in RAM. Takes memory only for what is under way.
#[derive(Debug)]
pub struct StagingArea {
    ram: GuestRam,
    /// Room for what the guest already holds of a huge page, while that is replaced: of one at a time.
    aside: Mutex<Option<GuestRam>>,
    pagemap: Pagemap,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// No address space.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// What is populated could not be told.
    #[error("cannot open /proc/self/pagemap: {0}")]
    Pagemap(#[from] io::Error),
}

impl StagingArea {
    /// For pages of `ram`.
    pub fn new(ram: &GuestRam) -> Result<Self, StagingError> {
        let (area, aside) = (GuestRam::allocate(ram.size())?, GuestRam::allocate(GRANULE)?);
        Ok(StagingArea { ram: area, aside: Mutex::new(Some(aside)), pagemap: Pagemap::open()? })
    }

    /// Where pages come together, under their own numbers.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Room for one huge page, for as long as it is held. None once it has been lost.
    pub(super) fn aside(&self) -> MutexGuard<'_, Option<GuestRam>> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which pages of `run` are populated in `ram`, another one.
    pub(super) fn populated(&self, ram: &GuestRam, run: PageRun) -> io::Result<Vec<bool>> {
        self.pagemap.populated(ram, run)
    }
}
