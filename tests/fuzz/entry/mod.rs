//! What is done with bytes from outside, for every place where Ferry takes some. The fuzzer and `tests/corpus.rs` both run these.
//! They panic where Ferry would be wrong: on a panic of its own, an allocation out of proportion, or a broken promise.

mod allocation;
mod boot;
mod command_line;
mod destination;
mod incremental;
mod machine_state;
mod nbd;
mod nbd_client;
mod qmp;
mod scratch;
mod serial;
mod session;
mod sidecar;
mod source;
pub mod virtio_blk;
mod virtio_mmio;
mod wire;

/// What is run with every input. Panics if something is wrong.
pub type Entry = fn(&[u8]);

/// Name and entry function of every target; its corpus is `tests/fuzz/corpus/NAME`.
pub const TARGETS: [(&str, Entry); 14] = [
    ("boot", boot::run),
    ("command_line", command_line::run),
    ("destination", destination::run),
    ("incremental", incremental::run),
    ("machine_state", machine_state::run),
    ("nbd", nbd::run),
    ("nbd_client", nbd_client::run),
    ("qmp", qmp::run),
    ("serial", serial::run),
    ("sidecar", sidecar::run),
    ("source", source::run),
    ("virtio_blk", virtio_blk::run),
    ("virtio_mmio", virtio_mmio::run),
    ("wire", wire::run),
];
