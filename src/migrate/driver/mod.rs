//! What connects the migration's state machines to the world: sockets, KVM, guest RAM and userfaultfd.


mod frames;
pub mod owner;
pub mod page_io;
mod saved;
pub mod source;



