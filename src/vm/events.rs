//! What the guest does that its owner must act on.

use std::fmt;
use std::sync::{Arc, OnceLock};

use crossbeam_channel::Sender;

/// The guest ended, or asked to be started again. At most one of these comes from one [`super::Vm`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// The guest powered itself off (ACPI S5).
    PowerOff,
    /// The guest asked to be reset. The machine does not do it: its owner drops it, clears RAM with [`crate::memory::GuestRam::clear`] and
    /// builds a new one over the same RAM.
    Reset,
    /// A vCPU cannot go on.
    Crashed {
        /// Which vCPU.
        vcpu: u16,
        /// What KVM said, in one sentence.
        reason: String,
    },
}

impl fmt::Display for VmEvent {
    /// What became of the guest, for a sentence about it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmEvent::PowerOff => f.write_str("it powered off"),
            VmEvent::Reset => f.write_str("it asked to restart"),
            VmEvent::Crashed { vcpu, reason } => write!(f, "vCPU {vcpu} cannot go on: {reason}"),
        }
    }
}

/// The sending end: passes on the first event and swallows what a dying guest does after it (one that powered off halts, one that asked
/// for a reset tries every other way to get one).
#[derive(Clone)]
pub struct EventSink {
    sender: Sender<VmEvent>,
    first: Arc<OnceLock<VmEvent>>,
}

impl EventSink {
    /// A sink for one machine.
    pub fn new(sender: Sender<VmEvent>) -> Self {
        EventSink { sender, first: Arc::default() }
    }

    /// Sends `event` if it is the first.
    pub fn send(&self, event: VmEvent) {
        if self.first.set(event.clone()).is_ok() {
            // An owner that stopped listening has no use for the event.
            let _ = self.sender.send(event);
        }
    }

    /// What was sent, if anything.
    pub fn sent(&self) -> Option<&VmEvent> {
        self.first.get()
    }
}
