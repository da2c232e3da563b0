//! Guest RAM: the mapping, its pages as the migration counts them, and the ways its changes and its missing pages are seen.

mod device_writes;
pub mod dirty_log;
pub mod dirty_ring;
pub mod dirty_tracker;
pub mod hugetlb;
mod page;
mod page_set;
mod pagemap;
pub mod populated;
pub mod ram;
pub mod staging;
pub mod thp;
pub mod uffd;

pub use page::{HUGE_PAGE, HostPage, PAGE_SIZE, PageNumber, PageRun};
pub use page_set::{PageSet, Runs};
pub use ram::GuestRam;
use ram::{GRANULE, RamError};
