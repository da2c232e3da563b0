//! Tiny guests that move for real: KVM, sockets and userfaultfd, in one process.

mod guest;
mod hosts;
mod moves;
