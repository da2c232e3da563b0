//! The control socket from the outside: hostile and slow clients, many clients, QEMU's own client.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod command_line;
mod hostile;
mod qemu_client;
mod raw_client;
mod recorder;
mod sessions;
