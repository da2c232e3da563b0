//! Guest RAM: the mapping, its pages as the migration counts them, and the ways its changes and its missing pages are seen.

mod page;
mod page_set;
pub mod ram;

pub use page::{PAGE_SIZE, PageNumber, PageRun};
pub use page_set::{PageSet, Runs};
pub use ram::GuestRam;
