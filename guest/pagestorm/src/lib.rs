//! The parts of pagestorm that need no hardware: command line, memory layout, page format and
//! the order of writes. A checker that looks at a stopped guest's memory or disk image from outside can
//! depend on this library; how to find everything is described in `main.rs`.
#![cfg_attr(not(test), no_std)]
#![deny(missing_docs)]

pub mod blocks;
pub mod cmdline;
pub mod cpu_record;
pub mod latency;
pub mod layout;
pub mod page;
pub mod workload;
