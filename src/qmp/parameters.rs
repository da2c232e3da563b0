//! Migration parameters: what `migrate-set-parameters` changes and `query-migrate-parameters` shows.

use serde::{Deserialize, Serialize};

use super::error::QmpError;
use crate::migrate::policy::Throttling;
use crate::migrate::report::Mode;

/// Longest downtime limit, as in QEMU: 2000 seconds.
pub const MAX_DOWNTIME_LIMIT_MS: u64 = 2_000_000;

/// Largest bandwidth, in bytes a second: what a signed integer holds.
const MAX_BANDWIDTH: u64 = i64::MAX as u64;

/// All migration parameters under QEMU's names, and Ferry's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrateParameters {
    /// The blackout that precopy aims for, in milliseconds.
    pub downtime_limit: u64,
    /// Limit on background traffic in precopy, in bytes a second; 0 is none.
    pub max_bandwidth: u64,
    /// Limit on background traffic in postcopy, in bytes a second; 0 is none.
    pub max_postcopy_bandwidth: u64,
    /// Bandwidth to count on in the switch, in bytes a second; 0 is what was measured.
    pub avail_switchover_bandwidth: u64,
    /// With `auto-converge`: percentage of the time in which vCPUs stand still, at first.
    pub cpu_throttle_initial: u64,
    /// By how much more each time that this does not suffice.
    pub cpu_throttle_increment: u64,
    /// At most.
    pub max_cpu_throttle: u64,
    /// Whether less is added where less is expected to suffice.
    pub cpu_throttle_tailslow: bool,
    /// When to switch to postcopy.
    pub ferry_mode: Mode,
    /// Whether `migrate` only finds out how a migration would go.
    pub ferry_dry_run: bool,
}

impl Default for MigrateParameters {
    fn default() -> Self {
        MigrateParameters {
            downtime_limit: 50,
            max_bandwidth: 0,
            max_postcopy_bandwidth: 0,
            avail_switchover_bandwidth: 0,
            cpu_throttle_initial: 20,
            cpu_throttle_increment: 10,
            max_cpu_throttle: 99,
            cpu_throttle_tailslow: false,
            ferry_mode: Mode::Auto,
            ferry_dry_run: false,
        }
    }
}

/// Arguments of `migrate-set-parameters`: those that are absent keep their value. Integers are
/// wider than any range, so that the error can name it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MigrateSetParameters {
    /// See [`MigrateParameters::downtime_limit`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_limit: Option<i128>,
    /// See [`MigrateParameters::max_bandwidth`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<i128>,
    /// See [`MigrateParameters::max_postcopy_bandwidth`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_postcopy_bandwidth: Option<i128>,
    /// See [`MigrateParameters::avail_switchover_bandwidth`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub avail_switchover_bandwidth: Option<i128>,
    /// See [`MigrateParameters::cpu_throttle_initial`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_initial: Option<i128>,
    /// See [`MigrateParameters::cpu_throttle_increment`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_increment: Option<i128>,
    /// See [`MigrateParameters::max_cpu_throttle`]. Not below `cpu-throttle-initial`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cpu_throttle: Option<i128>,
    /// See [`MigrateParameters::cpu_throttle_tailslow`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_tailslow: Option<bool>,
    /// See [`MigrateParameters::ferry_mode`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ferry_mode: Option<Mode>,
    /// See [`MigrateParameters::ferry_dry_run`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ferry_dry_run: Option<bool>,
}

impl MigrateParameters {
    /// Takes over what `changes` sets, all of it or, when a value is out of its range, nothing.
    pub fn set(&mut self, changes: &MigrateSetParameters) -> Result<(), QmpError> {
        let mut next = self.clone();
        let bandwidth = |name| Range { name, from: 0, to: MAX_BANDWIDTH, unit: "bytes a second" };
        let percentage = |name, from| Range { name, from, to: 99, unit: "per cent" };
        Range { name: "downtime-limit", from: 0, to: MAX_DOWNTIME_LIMIT_MS, unit: "milliseconds" }
            .assign(&mut next.downtime_limit, changes.downtime_limit)?;
        bandwidth("max-bandwidth").assign(&mut next.max_bandwidth, changes.max_bandwidth)?;
        bandwidth("max-postcopy-bandwidth").assign(&mut next.max_postcopy_bandwidth, changes.max_postcopy_bandwidth)?;
        bandwidth("avail-switchover-bandwidth").assign(&mut next.avail_switchover_bandwidth, changes.avail_switchover_bandwidth)?;
        percentage("cpu-throttle-initial", 1).assign(&mut next.cpu_throttle_initial, changes.cpu_throttle_initial)?;
        percentage("cpu-throttle-increment", 1).assign(&mut next.cpu_throttle_increment, changes.cpu_throttle_increment)?;
        // After the first of them, and checked also when only that one has changed.
        let max = changes.max_cpu_throttle.unwrap_or(next.max_cpu_throttle.into());
        percentage("max-cpu-throttle", next.cpu_throttle_initial).assign(&mut next.max_cpu_throttle, Some(max))?;
        if let Some(tailslow) = changes.cpu_throttle_tailslow {
            next.cpu_throttle_tailslow = tailslow;
        }
        if let Some(mode) = changes.ferry_mode {
            next.ferry_mode = mode;
        }
        if let Some(dry_run) = changes.ferry_dry_run {
            next.ferry_dry_run = dry_run;
        }
        *self = next;
        Ok(())
    }

    /// How the guest is slowed down, if it is.
    pub fn throttling(&self) -> Throttling {
        // At most 99, each of them.
        let percentage = |value: u64| u8::try_from(value).unwrap_or(99);
        Throttling {
            initial: percentage(self.cpu_throttle_initial),
            increment: percentage(self.cpu_throttle_increment),
            max: percentage(self.max_cpu_throttle),
            tailslow: self.cpu_throttle_tailslow,
        }
    }
}

/// What values a parameter may have.
struct Range {
    name: &'static str,
    from: u64,
    to: u64,
    unit: &'static str,
}

impl Range {
    fn assign(&self, target: &mut u64, value: Option<i128>) -> Result<(), QmpError> {
        let Some(value) = value else { return Ok(()) };
        let Range { name, from, to, unit } = self;
        *target = u64::try_from(value)
            .ok()
            .filter(|value| (*from..=*to).contains(value))
            .ok_or_else(|| QmpError::generic(format!("parameter '{name}' is an integer from {from} to {to} {unit}, not {value}")))?;
        Ok(())
    }
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
        for bad in [-1, 2_000_001, u64::MAX.into()] {
            let changes = MigrateSetParameters { max_bandwidth: Some(7), downtime_limit: Some(bad), ..Default::default() };
            let error = parameters.set(&changes).unwrap_err();
            assert!(error.desc.contains("from 0 to 2000000 milliseconds"), "{error}");
        }
        assert_eq!(parameters, MigrateParameters::default());
    }

    #[test]
    fn percentages_have_qemu_s_ranges() {
        let mut parameters = MigrateParameters::default();
        assert_eq!(parameters.throttling(), Throttling { initial: 20, increment: 10, max: 99, tailslow: false });
        let initial = |value| MigrateSetParameters { cpu_throttle_initial: Some(value), ..Default::default() };
        let max = |value| MigrateSetParameters { max_cpu_throttle: Some(value), ..Default::default() };
        for (bad, range) in
            [(initial(0), "from 1 to 99"), (initial(100), "from 1 to 99"), (max(19), "from 20 to 99"), (max(-1), "from 20 to 99")]
        {
            let error = parameters.set(&bad).unwrap_err();
            assert!(error.desc.contains(range), "{error}");
        }
        parameters.set(&max(60)).unwrap();
        assert!(parameters.set(&initial(61)).is_err());
        assert_eq!(parameters.throttling(), Throttling { initial: 20, increment: 10, max: 60, tailslow: false });
    }
}
