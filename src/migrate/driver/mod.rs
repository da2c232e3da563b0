//! What connects the migration's state machines to the world: sockets, KVM, guest RAM and userfaultfd.

pub mod destination;
pub mod owner;
pub mod page_io;
pub mod source;
