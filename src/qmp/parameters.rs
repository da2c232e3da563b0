//! Migration parameters: what `migrate-set-parameters` changes and `query-migrate-parameters` shows.

use serde::{Deserialize, Serialize};

use super::error::QmpError;
use crate::migrate::report::Mode;

/// Longest downtime limit, as in QEMU: 2000 seconds.
pub const MAX_DOWNTIME_LIMIT_MS: u64 = 2_000_000;

/// All migration parameters under QEMU's names, and Ferry's own `ferry-mode`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrateParameters {
    /// The blackout that precopy aims for, in milliseconds.
    pub downtime_limit: u64,
    /// Limit on background traffic in precopy, in bytes a second; 0 is none.
    pub max_bandwidth: u64,
    /// Limit on background traffic in postcopy, in bytes a second; 0 is none.
    pub max_postcopy_bandwidth: u64,
    /// When to switch to postcopy.
    pub ferry_mode: Mode,
}

impl Default for MigrateParameters {
    fn default() -> Self {
        MigrateParameters { downtime_limit: 50, max_bandwidth: 0, max_postcopy_bandwidth: 0, ferry_mode: Mode::Auto }
    }
}

/// Arguments of `migrate-set-parameters`: those that are absent keep their value. Integers are signed to name the range in the error.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MigrateSetParameters {
    /// See [`MigrateParameters::downtime_limit`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_limit: Option<i64>,
    /// See [`MigrateParameters::max_bandwidth`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<i64>,
    /// See [`MigrateParameters::max_postcopy_bandwidth`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_postcopy_bandwidth: Option<i64>,
    /// See [`MigrateParameters::ferry_mode`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ferry_mode: Option<Mode>,
}

impl MigrateParameters {
    /// Takes over what `changes` sets, all of it or, when a value is out of its range, nothing.
    pub fn set(&mut self, changes: &MigrateSetParameters) -> Result<(), QmpError> {
        let mut next = self.clone();
        let bandwidth_max = i64::MAX as u64;
        assign(&mut next.downtime_limit, changes.downtime_limit, "downtime-limit", MAX_DOWNTIME_LIMIT_MS, "milliseconds")?;
        assign(&mut next.max_bandwidth, changes.max_bandwidth, "max-bandwidth", bandwidth_max, "bytes a second")?;
        assign(
            &mut next.max_postcopy_bandwidth,
            changes.max_postcopy_bandwidth,
            "max-postcopy-bandwidth",
            bandwidth_max,
            "bytes a second",
        )?;
        if let Some(mode) = changes.ferry_mode {
            next.ferry_mode = mode;
        }
        *self = next;
        Ok(())
    }
}

fn assign(target: &mut u64, value: Option<i64>, name: &str, max: u64, unit: &str) -> Result<(), QmpError> {
    let Some(value) = value else { return Ok(()) };
    *target = u64::try_from(value)
        .ok()
        .filter(|value| *value <= max)
        .ok_or_else(|| QmpError::generic(format!("parameter '{name}' is an integer from 0 to {max} {unit}, not {value}")))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_parameters_keep_their_value() {
        let mut parameters = MigrateParameters::default();
        parameters.set(&MigrateSetParameters { max_bandwidth: Some(7), ..Default::default() }).unwrap();
        assert_eq!(parameters, MigrateParameters { max_bandwidth: 7, ..Default::default() });
    }

    #[test]
    fn one_bad_value_changes_nothing_and_names_its_range() {
        let mut parameters = MigrateParameters::default();
        for bad in [-1, 2_000_001] {
            let changes = MigrateSetParameters { max_bandwidth: Some(7), downtime_limit: Some(bad), ..Default::default() };
            let error = parameters.set(&changes).unwrap_err();
            assert!(error.desc.contains("from 0 to 2000000 milliseconds"), "{error}");
        }
        assert_eq!(parameters, MigrateParameters::default());
    }
}
