//! What connects the migration's state machines to the world: sockets, KVM, guest RAM and userfaultfd.

mod awake;
mod block_io;
pub mod destination;
mod frames;
pub mod owner;
pub mod page_io;
mod populate;
pub mod saved;
pub mod scheduling;
pub mod source;

#[cfg(test)]
mod tests;
