//! Ferry, a small KVM virtual machine monitor whose reason to exist is live migration.
#![deny(missing_docs)]

pub mod backup;
pub mod block;
pub mod boot;
pub mod cli;
pub mod device;
pub mod memory;
pub mod migrate;
pub mod qmp;
pub mod vm;
pub mod vmm;
