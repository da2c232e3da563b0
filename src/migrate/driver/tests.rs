//! Tiny guests that move for real: KVM, sockets and userfaultfd, in one process.

mod failures;
mod guest;
mod hostile;
mod hosts;
mod moves;
mod peers;
mod relay;
