//! Real Ferries: processes, sockets, userfaultfd and disks move the test kernel pagestorm, which checks its own RAM and disk all the time.
//!
//! | file | concern |
//! |---|---|
//! | `lab` | one test's directory, Ferries, disks and guests |
//! | `process`, `output` | processes, their output, their end within a time limit, and no survivors |
//! | `ferry` | `ferry run`, `ferry receive` and their control socket |
//! | `migration` | `ferry migrate` as a user calls it |
//! | `guest` | what a guest says, followed over all its moves: one unbroken story |
//! | `disk` | images, checked from outside |
//! | `nbd_client` | clients of exported disks, Debian's and a raw one |
//! | `gate` | an NBD server's answers, held back half-way |
//! | `proxy` | a link that can be cut |
//! | `ram` | a stopped guest's RAM, checked from outside |
//! | `pagestorm_kernel` | builds the test kernel |
//! | `puppet` | another kernel, which powers off or resets when it is told to |
//!
//! All other files are tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod disk;
mod ferry;
mod gate;
mod guest;
mod lab;
mod migration;
mod nbd_client;
mod output;
mod pagestorm_kernel;
mod process;
mod proxy;
mod puppet;
mod ram;

mod after_commit;
mod backup;
mod before_commit;
mod bitmap_matrix;
mod bitmaps;
mod control;
mod convergence;
mod dirty_tracking;
mod disk_errors;
mod disk_options;
mod ends;
mod faults;
mod hugetlb;
mod memory;
mod moves;
mod nbd;
mod persistent_bitmaps;
mod qemu_client;
mod recovery;
mod reports;
mod scheduling;
mod snapshots;
mod storage_copy;
mod strangers;
mod streams;
mod switchover;
