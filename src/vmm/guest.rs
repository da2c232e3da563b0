//! Who may run the guest now. The right to run it is the value [`Vm<Paused>`] or [`Vm<Running>`], and it is in exactly one place.

use crate::memory::GuestRam;
use crate::migrate::driver::owner::StoppedGuest;
use crate::qmp::response::RunState;
use crate::vm::config::GuestConfig;
use crate::vm::{Failed, Lull, Moved, Paused, Running, Vm};

/// The guest, as far as this process has it.
#[derive(Default)]
pub(super) enum Guest {
    /// Not here yet, or ended.
    #[default]
    None,
    /// The vCPUs run.
    Running(Vm<Running>),
    /// A person paused it, or it came paused.
    Paused(Vm<Paused>),
    /// A migration has stopped it and holds it.
    Taken,
    /// It was given to another host.
    Moved {
        /// Its RAM, of which the destination may need pages yet.
        _ram: Option<Vm<Moved>>,
    },
}

/// Why the guest cannot be stopped or run now.
pub(super) type Refusal = String;

impl Guest {
    /// QMP's word for it.
    pub fn run_state(&self) -> RunState {
        match self {
            Guest::None => RunState::Inmigrate,
            Guest::Running(_) => RunState::Running,
            Guest::Paused(_) => RunState::Paused,
            Guest::Taken => RunState::FinishMigrate,
            Guest::Moved { .. } => RunState::Postmigrate,
        }
    }

    /// The configuration, while the guest is here.
    pub fn config(&self) -> Option<&GuestConfig> {
        match self {
            Guest::Running(vm) => Some(vm.config()),
            Guest::Paused(vm) => Some(vm.config()),
            _ => None,
        }
    }

    /// For waiting until it sleeps, if it runs.
    pub fn lull(&self) -> Option<Lull> {
        match self {
            Guest::Running(vm) => Some(vm.lull().clone()),
            _ => None,
        }
    }

    /// The guest's RAM, if it is here and its RAM is to be held in memory.
    pub fn memory_to_lock(&self) -> Option<GuestRam> {
        let ram = match self {
            Guest::Running(vm) => vm.ram(),
            Guest::Paused(vm) => vm.ram(),
            _ => return None,
        };
        self.config().filter(|config| config.lock_memory).map(|_| ram.clone())
    }

    /// Presses the power button of a running guest.
    pub fn power_button(&self) -> Result<(), Refusal> {
        match self {
            Guest::Running(vm) => vm.power_button().map_err(|error| error.to_string()),
            other => Err(other.why_not("be asked to power off")),
        }
    }

    /// Pauses the guest; true if it ran.
    pub fn pause(&mut self) -> Result<bool, Refusal> {
        match std::mem::take(self) {
            Guest::Running(vm) => match vm.pause() {
                Ok(paused) => {
                    *self = Guest::Paused(paused);
                    Ok(true)
                }
                Err(Failed { vm, error }) => {
                    *self = Guest::Running(vm);
                    Err(format!("the guest cannot be paused: {error}"))
                }
            },
            other => {
                let paused = matches!(other, Guest::Paused(_));
                *self = other;
                if paused { Ok(false) } else { Err(self.why_not("be paused")) }
            }
        }
    }

    /// Lets the guest run; true if it did not.
    pub fn resume(&mut self) -> Result<bool, Refusal> {
        match std::mem::take(self) {
            Guest::Paused(vm) => match vm.resume() {
                Ok(running) => {
                    *self = Guest::Running(running);
                    Ok(true)
                }
                Err(Failed { vm, error }) => {
                    *self = Guest::Paused(vm);
                    Err(format!("the guest cannot be resumed: {error}"))
                }
            },
            other => {
                let running = matches!(other, Guest::Running(_));
                *self = other;
                if running { Ok(false) } else { Err(self.why_not("be resumed")) }
            }
        }
    }

    /// Stops the guest and takes it away, for a migration to hand over or put back.
    pub fn take(&mut self) -> Result<StoppedGuest, Refusal> {
        let was_running = self.pause()?;
        match std::mem::replace(self, Guest::Taken) {
            Guest::Paused(vm) => Ok(StoppedGuest { vm, was_running }),
            other => {
                *self = other;
                Err(self.why_not("be moved"))
            }
        }
    }

    /// Takes back what [`Guest::take`] gave, or a guest that has arrived.
    pub fn put(&mut self, vm: Vm<Paused>) {
        *self = Guest::Paused(vm);
    }

    /// Ends the guest; what it takes to build it again, if it is here.
    pub fn end(&mut self) -> Option<(GuestConfig, GuestRam)> {
        let parts = match self {
            Guest::Running(vm) => (vm.config().clone(), vm.ram().clone()),
            Guest::Paused(vm) => (vm.config().clone(), vm.ram().clone()),
            _ => return None,
        };
        *self = Guest::None;
        Some(parts)
    }

    /// Why the guest cannot do what was asked.
    pub fn why_not(&self, what: &str) -> Refusal {
        let why = match self {
            Guest::None => "it is not here",
            Guest::Running(_) => "it is running",
            Guest::Paused(_) => "it is paused",
            Guest::Taken => "a migration is handing it over just now; try again in a moment",
            Guest::Moved { .. } => "it has moved to another host and never runs here again",
        };
        format!("the guest cannot {what}: {why}")
    }
}
