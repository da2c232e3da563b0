//! hugetlb pages for tests.

use std::fs::File;
use std::io::{Read, Result, Seek, Write};

use rustix::fs::{FlockOperation, flock};

use super::{COUNTS, Pool};

/// Leave for `pages` more hugetlb pages than the administrator has set aside, taken back on drop. The kernel makes them when they are asked
/// for, so that nothing stays behind if a test dies. Several tests and processes may do this at a time.
pub struct Provision {
    pages: u64,
    /// Locked for as long as this lives.
    _others: File,
}

impl Provision {
    /// The test fails where there are too few pages and this user may not change that: like KVM, they are part of what is tested.
    pub fn new(pages: u64) -> Self {
        Self::make(pages, FlockOperation::LockShared)
    }

    /// The only one, for a test that tries to get more than there are: others would find none meanwhile.
    #[allow(dead_code, reason = "the live tests have such a test")]
    pub fn only(pages: u64) -> Self {
        Self::make(pages, FlockOperation::LockExclusive)
    }

    fn make(pages: u64, with_others: FlockOperation) -> Self {
        let made = File::open(format!("{COUNTS}/free_hugepages")).and_then(|others| {
            flock(&others, with_others)?;
            change(|allowed| allowed + pages)?;
            Ok(Provision { pages, _others: others })
        });
        made.unwrap_or_else(|error| {
            let free = Pool::read().map_or(0, |pool| pool.free);
            panic!(
                "this test needs {pages} huge pages of 2 MiB, {free} are free, and this user may not have the kernel make more ({error}); \
                 run it as root"
            )
        })
    }

    /// Takes the leave back; pages that are in use stay.
    pub fn withdraw(&mut self) {
        let pages = std::mem::take(&mut self.pages);
        let _ = change(|allowed| allowed.saturating_sub(pages));
    }
}

impl Drop for Provision {
    fn drop(&mut self) {
        self.withdraw();
    }
}

fn change(how: impl FnOnce(u64) -> u64) -> Result<()> {
    let mut file = File::options().read(true).write(true).open(format!("{COUNTS}/nr_overcommit_hugepages"))?;
    // Until the file is closed.
    flock(&file, FlockOperation::LockExclusive)?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let allowed = text.trim().parse().map_err(std::io::Error::other)?;
    file.rewind()?;
    file.write_all(how(allowed).to_string().as_bytes())
}
