//! Migration capabilities: QEMU makes them a choice, Ferry mostly does not.

use serde::{Deserialize, Serialize};

use super::error::QmpError;
use crate::migrate::report::Mode;

/// QEMU's migration capabilities that Ferry knows by name, without those that only suit emulators with other devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Capability {
    /// Postcopy may follow precopy.
    PostcopyRam,
    /// Disks' dirty bitmaps go along.
    DirtyBitmaps,
    /// MIGRATION events are sent.
    Events,
    /// The destination answers over the same connection.
    ReturnPath,
    /// Pages that the guest waits for have a connection of their own.
    PostcopyPreempt,
    /// The time that vCPUs wait for pages is measured.
    PostcopyBlocktime,
    /// The destination is asked before the guest stops.
    SwitchoverAck,
    /// Compression of pages against their last version.
    Xbzrle,
    /// Slowing the guest's vCPUs.
    AutoConverge,
    /// Several connections for pages.
    Multifd,
    /// Waiting for a person before the switch.
    PauseBeforeSwitchover,
    /// MSG_ZEROCOPY.
    ZeroCopySend,
    /// Slowing vCPUs that dirty too much.
    DirtyLimit,
}

/// One capability and its state, as both commands have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapabilityStatus {
    /// Which.
    pub capability: Capability,
    /// Whether it is on.
    pub state: bool,
}

/// The capabilities that a person can choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrateCapabilities {
    /// Whether a migration may switch to postcopy, whatever its mode.
    pub postcopy_ram: bool,
    /// Whether disks' dirty bitmaps go along.
    pub dirty_bitmaps: bool,
    /// Whether the guest may be slowed down where precopy does not end otherwise.
    pub auto_converge: bool,
    /// Whether a migration waits for `migrate-continue` when the guest stands still, before it is handed over.
    pub pause_before_switchover: bool,
}

impl Default for MigrateCapabilities {
    fn default() -> Self {
        MigrateCapabilities { postcopy_ram: true, dirty_bitmaps: true, auto_converge: false, pause_before_switchover: false }
    }
}

impl MigrateCapabilities {
    const KNOWN: [Capability; 13] = [
        Capability::PostcopyRam,
        Capability::DirtyBitmaps,
        Capability::Events,
        Capability::ReturnPath,
        Capability::PostcopyPreempt,
        Capability::PostcopyBlocktime,
        Capability::SwitchoverAck,
        Capability::Xbzrle,
        Capability::AutoConverge,
        Capability::Multifd,
        Capability::PauseBeforeSwitchover,
        Capability::ZeroCopySend,
        Capability::DirtyLimit,
    ];

    /// The mode of a migration for which `asked` was asked: without the capability nothing goes by postcopy.
    pub fn mode(&self, asked: Mode) -> Mode {
        if self.postcopy_ram { asked } else { Mode::Precopy }
    }

    /// Whether `capability` is on.
    pub fn get(&self, capability: Capability) -> bool {
        use Capability::*;
        match capability {
            PostcopyRam => self.postcopy_ram,
            DirtyBitmaps => self.dirty_bitmaps,
            AutoConverge => self.auto_converge,
            PauseBeforeSwitchover => self.pause_before_switchover,
            Events | ReturnPath | PostcopyPreempt | PostcopyBlocktime | SwitchoverAck | Multifd => true,
            Xbzrle | ZeroCopySend | DirtyLimit => false,
        }
    }

    /// All capabilities: the answer to `query-migrate-capabilities`.
    pub fn list(&self) -> Vec<CapabilityStatus> {
        Self::KNOWN.into_iter().map(|capability| CapabilityStatus { capability, state: self.get(capability) }).collect()
    }

    /// Takes over `changes`, all of them or, when one is not a choice in Ferry, none.
    pub fn set(&mut self, changes: &[CapabilityStatus]) -> Result<(), QmpError> {
        let mut next = *self;
        for change in changes {
            match change.capability {
                Capability::PostcopyRam => next.postcopy_ram = change.state,
                Capability::DirtyBitmaps => next.dirty_bitmaps = change.state,
                Capability::AutoConverge => next.auto_converge = change.state,
                Capability::PauseBeforeSwitchover => next.pause_before_switchover = change.state,
                fixed if self.get(fixed) == change.state => {}
                fixed => {
                    let name = serde_json::to_string(&fixed).unwrap_or_default().replace('"', "'");
                    let why = if change.state { "Ferry does not have it" } else { "Ferry always works with it" };
                    return Err(QmpError::generic(format!("capability {name} cannot be switched {}: {why}", on_off(change.state))));
                }
            }
        }
        *self = next;
        Ok(())
    }
}

fn on_off(state: bool) -> &'static str {
    if state { "on" } else { "off" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_fixed_can_be_set_to_what_it_is_only() {
        let mut capabilities = MigrateCapabilities::default();
        let chosen = [Capability::PostcopyRam, Capability::DirtyBitmaps, Capability::AutoConverge, Capability::PauseBeforeSwitchover];
        let postcopy_off = CapabilityStatus { capability: Capability::PostcopyRam, state: false };
        for status in capabilities.list().into_iter().filter(|status| !chosen.contains(&status.capability)) {
            capabilities.set(&[status]).unwrap();
            let error = capabilities.set(&[postcopy_off, CapabilityStatus { state: !status.state, ..status }]).unwrap_err();
            assert!(error.desc.contains("Ferry"), "{error}");
        }
        assert!(capabilities.postcopy_ram, "a refused change must change nothing");
        capabilities.set(&[postcopy_off]).unwrap();
        assert!(!capabilities.postcopy_ram);
    }
}
