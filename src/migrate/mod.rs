//! Live migration: pure state machines for both sides, and the driver that connects them to sockets, KVM and userfaultfd.

pub mod driver;
pub mod pace;
pub mod report;
pub mod transport;
