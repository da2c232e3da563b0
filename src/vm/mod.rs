//! The virtual machine: vCPUs, their state, and the life of a guest as types.

pub mod config;
