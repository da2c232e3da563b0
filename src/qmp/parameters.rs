//! Migration parameters: what `migrate-set-parameters` changes and `query-migrate-parameters` shows.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use super::error::QmpError;
use crate::migrate::bitmap_mapping::{BitmapMapping, NodeMapping};
use crate::migrate::driver::owner::PageTransfer;
use crate::migrate::policy::Throttling;
use crate::migrate::report::Mode;
use crate::migrate::wire::{MAX_PAGE_CHANNELS, Method};

/// Longest downtime limit, as in QEMU: 2000 seconds.
pub const MAX_DOWNTIME_LIMIT_MS: u64 = 2_000_000;

/// Largest bandwidth, in bytes a second: what a signed integer holds.
const MAX_BANDWIDTH: u64 = i64::MAX as u64;

/// How pages are compressed where that saves time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MultifdCompression {
    /// Not at all.
    None,
    /// By LZ4.
    Lz4,
    /// By Zstandard.
    Zstd,
}

/// Whether pages of zeros are found and sent by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ZeroPageDetection {
    /// They go as any other page.
    None,
    /// By who sends them: the same as `multifd`, as all pages are sent by the threads of their connections.
    Legacy,
    /// By the threads that send them.
    Multifd,
}

/// What becomes of a guest's disks when it moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// Both hosts see them.
    Shared,
    /// Their contents go along, to images that the destination makes; read-only disks both hosts must have.
    Copy,
}

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
    /// Connections for pages: what suits the host and the bandwidth limit until it is set.
    pub multifd_channels: u64,
    /// Whether it was.
    #[serde(skip)]
    pub channels_are_set: bool,
    /// How pages are compressed where that saves time.
    pub multifd_compression: MultifdCompression,
    /// Whether pages of zeros go by name.
    pub zero_page_detection: ZeroPageDetection,
    /// Which dirty bitmaps go along, and what they are called on the way; at both sides. Every one, under its own name, until it is set.
    #[serde(default, skip_serializing_if = "BitmapMapping::is_default")]
    pub block_bitmap_mapping: BitmapMapping,
    /// Whether the contents of disks go along.
    pub ferry_storage: Storage,
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
            multifd_channels: PageTransfer::default_channels(None).into(),
            channels_are_set: false,
            multifd_compression: MultifdCompression::None,
            zero_page_detection: ZeroPageDetection::Multifd,
            block_bitmap_mapping: BitmapMapping::default(),
            ferry_storage: Storage::Shared,
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
    /// See [`MigrateParameters::multifd_channels`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multifd_channels: Option<i128>,
    /// See [`MigrateParameters::multifd_compression`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multifd_compression: Option<MultifdCompression>,
    /// See [`MigrateParameters::zero_page_detection`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_page_detection: Option<ZeroPageDetection>,
    /// See [`MigrateParameters::block_bitmap_mapping`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_bitmap_mapping: Option<Vec<NodeMapping>>,
    /// See [`MigrateParameters::ferry_storage`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ferry_storage: Option<Storage>,
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
        Range { name: "multifd-channels", from: 1, to: MAX_PAGE_CHANNELS.into(), unit: "connections" }
            .assign(&mut next.multifd_channels, changes.multifd_channels)?;
        next.channels_are_set |= changes.multifd_channels.is_some();
        if !next.channels_are_set {
            next.multifd_channels = PageTransfer::default_channels(NonZeroU64::new(next.max_bandwidth)).into();
        }
        next.multifd_compression = changes.multifd_compression.unwrap_or(next.multifd_compression);
        next.zero_page_detection = changes.zero_page_detection.unwrap_or(next.zero_page_detection);
        if let Some(nodes) = &changes.block_bitmap_mapping {
            next.block_bitmap_mapping = BitmapMapping::new(nodes.clone()).map_err(QmpError::generic)?;
        }
        next.ferry_storage = changes.ferry_storage.unwrap_or(next.ferry_storage);
        if let Some(mode) = changes.ferry_mode {
            next.ferry_mode = mode;
        }
        if let Some(dry_run) = changes.ferry_dry_run {
            next.ferry_dry_run = dry_run;
        }
        *self = next;
        Ok(())
    }

    /// How pages travel.
    pub fn page_transfer(&self) -> PageTransfer {
        PageTransfer {
            // At most MAX_PAGE_CHANNELS.
            channels: u8::try_from(self.multifd_channels).unwrap_or(MAX_PAGE_CHANNELS),
            compression: match self.multifd_compression {
                MultifdCompression::None => None,
                MultifdCompression::Lz4 => Some(Method::Lz4),
                MultifdCompression::Zstd => Some(Method::Zstd),
            },
            zero_page_detection: self.zero_page_detection != ZeroPageDetection::None,
        }
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
    fn connections_suit_the_bandwidth_until_a_person_says_how_many() {
        let mut parameters = MigrateParameters::default();
        let unlimited = parameters.multifd_channels;
        let limit = |limit| MigrateSetParameters { max_bandwidth: Some(limit), ..Default::default() };
        parameters.set(&limit(1_000_000)).unwrap();
        assert_eq!(parameters.page_transfer().channels, 1);
        parameters.set(&limit(0)).unwrap();
        assert_eq!(parameters.multifd_channels, unlimited);
        parameters.set(&MigrateSetParameters { multifd_channels: Some(7), ..Default::default() }).unwrap();
        parameters.set(&limit(1_000_000)).unwrap();
        assert_eq!(parameters.page_transfer().channels, 7);
        let error = parameters.set(&MigrateSetParameters { multifd_channels: Some(17), ..Default::default() }).unwrap_err();
        assert!(error.desc.contains("from 1 to 16"), "{error}");
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
