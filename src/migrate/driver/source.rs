//! stub
use super::owner::*;
use crate::block::disk::Disk;
use crate::memory::GuestRam;
use crate::migrate::report::Progress;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;
#[allow(missing_docs)]
pub struct SourceMigration;
#[allow(missing_docs)]
#[allow(clippy::all)]
impl SourceMigration {
    pub fn start(
        _: SourceRequest,
        _: MachineSetup,
        _: GuestRam,
        _: Arc<kvm_ioctls::VmFd>,
        _: Vec<Arc<Disk>>,
        _: Arc<dyn SourceOwner>,
    ) -> Result<Self, String> {
        Err("".into())
    }
    pub fn cancel(&self) -> Result<(), String> {
        Ok(())
    }
    pub fn start_postcopy(&self) -> Result<(), String> {
        Ok(())
    }
    pub fn is_committed(&self) -> bool {
        false
    }
    pub fn progress(&self) -> Progress {
        Progress::default()
    }
    pub fn set_downtime_limit(&self, _: Duration) {}
    pub fn set_max_bandwidth(&self, _: Option<NonZeroU64>) {}
    pub fn set_max_postcopy_bandwidth(&self, _: Option<NonZeroU64>) {}
}
