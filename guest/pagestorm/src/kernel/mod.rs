//! The kernel proper: hardware and the workload on it.

pub mod boot;
pub mod console;
pub mod cpus;
pub mod disk;
pub mod exceptions;
pub mod lapic;
pub mod mem;
pub mod paging;
pub mod port;
pub mod power;
pub mod reporter;
pub mod start_info;
pub mod time;
pub mod verdict;
pub mod virtio_blk;
pub mod worker;
pub mod world;
