//! Live migration: pure state machines for both sides, and the driver that connects them to sockets, KVM and userfaultfd.

pub mod bitmap_mapping;
pub mod bitmaps;
pub mod blocktime;
pub mod compression;
pub mod destination;
pub mod driver;
pub mod forecast;
pub mod incoming;
pub mod layout;
pub mod outgoing;
pub mod pace;
pub mod policy;
pub mod prefetch;
pub mod report;
pub mod source;
pub mod staging;
pub mod transport;
pub mod wire;
