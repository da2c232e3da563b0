//! What a guest needs of its host.

use serde::{Deserialize, Serialize};

/// What a guest needs of its host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineFacts {}
