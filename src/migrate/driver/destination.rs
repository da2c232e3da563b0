//! stub
use super::owner::*;
use crate::migrate::report::Status;
use crate::migrate::transport::Listener;
use std::sync::Arc;
#[allow(missing_docs)]
pub struct DestinationMigration;
#[allow(missing_docs)]
#[allow(clippy::all)]
impl DestinationMigration {
    pub fn start(_: Listener, _: Arc<dyn DestinationOwner>) -> Result<Self, String> {
        Err("".into())
    }
    pub fn missing_pages(&self) -> u64 {
        0
    }
    pub fn status(&self) -> Status {
        Status::None
    }
}
