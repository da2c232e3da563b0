//! hugetlb pages for tests.

use std::fs::File;
use std::io::{Read, Seek, Write};

use super::{COUNTS, Pool};

/// Leave for `pages` more hugetlb pages than the administrator has set aside, taken back on drop. The kernel makes them when they are asked
/// for, so that nothing stays behind if a test dies. Several tests and processes may do this at a time.
pub struct Provision {
    pages: u64,
}

impl Provision {
    /// The test fails where there are too few pages and this user may not change that: like KVM, they are part of what is tested.
    pub fn new(pages: u64) -> Self {
        change(|allowed| allowed + pages).unwrap_or_else(|error| {
            let free = Pool::read().map_or(0, |pool| pool.free);
            panic!(
                "this test needs {pages} huge pages of 2 MiB, {free} are free, and this user may not have the kernel make more ({error}); \
                 run it as root"
            )
        });
        Provision { pages }
    }
}

impl Drop for Provision {
    fn drop(&mut self) {
        let _ = change(|allowed| allowed.saturating_sub(self.pages));
    }
}

fn change(how: impl FnOnce(u64) -> u64) -> std::io::Result<()> {
    let mut file = File::options().read(true).write(true).open(format!("{COUNTS}/nr_overcommit_hugepages"))?;
    // Held until the file is closed: others change the number as well.
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let allowed = text.trim().parse().map_err(std::io::Error::other)?;
    file.rewind()?;
    file.write_all(how(allowed).to_string().as_bytes())
}
