//! The virtual machine: vCPUs, their state, and the life of a guest as types.

mod apic_timer;
mod chips;
mod clock;
pub mod config;
mod cpuid;
pub mod empty;
mod error;
pub mod events;
mod exits;
pub mod facts;
mod hot_pages;
mod ioctls;
mod kick;
pub mod layout;
mod lull;
mod machine;
mod msr;
mod restore_vcpu;
mod save_vcpu;
pub mod state;
mod throttle;
mod vcpu;

pub use error::VmError;
pub use events::VmEvent;
pub use exits::emulates_ring_0;
pub use hot_pages::hot_pages;
pub use lull::Lull;
pub use machine::{Built, Failed, Moved, Paused, Running, Vm};
pub use state::MachineState;

#[cfg(test)]
mod tests;
