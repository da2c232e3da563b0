//! What a migration tells people and tools: where it stands, and in the end what it cost.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// `time` as reports have it.
pub(super) fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// How the guest's RAM is to move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Precopy passes while they help, then postcopy.
    #[default]
    Auto,
    /// Precopy to the end, never postcopy.
    Precopy,
    /// Postcopy at once.
    Postcopy,
}

/// Where a migration stands, in the words of QEMU's `query-migrate` and MIGRATION event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// There has been no migration.
    #[default]
    None,
    /// Connecting, negotiating; the destination builds the machine.
    Setup,
    /// Precopy; the guest runs at the source.
    Active,
    /// The guest stands still at the source, and a person is waited for before the switch.
    PreSwitchover,
    /// The switch: the guest runs nowhere.
    Device,
    /// The guest runs at the destination, pages are still to come.
    PostcopyActive,
    /// The link broke after the commit; missing pages stay missing until it is repaired.
    PostcopyPaused,
    /// Source and destination are comparing on a new link what is missing.
    PostcopyRecover,
    /// The destination holds every page and every bitmap.
    Completed,
    /// It ended without moving the guest, or lost the rest of it.
    Failed,
    /// A person's cancel is being carried out.
    Cancelling,
    /// A person ended it before the commit.
    Cancelled,
}

impl Status {
    /// Whether a migration is under way.
    pub fn is_active(self) -> bool {
        matches!(
            self,
            Self::Setup
                | Self::Active
                | Self::PreSwitchover
                | Self::Device
                | Self::PostcopyActive
                | Self::PostcopyPaused
                | Self::PostcopyRecover
                | Self::Cancelling
        )
    }
}

/// Bytes on the wire by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BytesByKind {
    /// Page contents.
    pub pages: u64,
    /// Frame headers, zero runs, discards and other control.
    pub control: u64,
    /// Device, vCPU and VM state.
    pub device_state: u64,
    /// Dirty bitmaps of disks.
    pub bitmaps: u64,
    /// Blocks of copied disks.
    #[serde(default)]
    pub blocks: u64,
}

impl BytesByKind {
    /// All of them together.
    pub fn total(&self) -> u64 {
        self.pages + self.control + self.device_state + self.bitmaps + self.blocks
    }
}

/// How a source's migration stands now: the data behind `query-migrate` and the progress display.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// Where it stands.
    pub status: Status,
    /// Time since it began, in milliseconds.
    pub total_time_ms: u64,
    /// Time until the destination was ready for pages, in milliseconds.
    pub setup_time_ms: u64,
    /// RAM of the guest, in bytes.
    pub ram_total: u64,
    /// Bytes of pages still to be sent in this pass, or in postcopy.
    pub ram_remaining: u64,
    /// Size of the disks that are copied, in bytes.
    #[serde(default)]
    pub disk_total: u64,
    /// Bytes of their blocks still to be sent in this pass, or in postcopy.
    #[serde(default)]
    pub disk_remaining: u64,
    /// Pages sent with contents, all passes together.
    pub normal_pages: u64,
    /// Pages that were zero and not sent as data.
    pub zero_pages: u64,
    /// Pages the destination asked for.
    pub postcopy_requests: u64,
    /// Passes begun.
    pub pass: u32,
    /// Pages dirtied a second while the last pass ran.
    pub dirty_pages_rate: u64,
    /// Rate of the last second or pass, in bytes a second.
    pub bandwidth: u64,
    /// Bytes on the wire.
    pub bytes: BytesByKind,
    /// At the destination: pages, and blocks of disks, that the guest waits for just now.
    #[serde(default)]
    pub waiting_pages: u64,
    /// How long the first of them has been waited for, in milliseconds.
    #[serde(default)]
    pub waiting_ms: u64,
    /// At the destination: the page faults of a postcopy.
    #[serde(default)]
    pub faults: Option<Faults>,
    /// At the destination: the waits for blocks of disks that are copied.
    #[serde(default)]
    pub block_waits: Option<BlockWaits>,
    /// The blackout that switching now would cost, in milliseconds.
    pub expected_downtime_ms: u64,
    /// What was decided last, and why, in words.
    #[serde(default)]
    pub reason: String,
    /// Percentage of the time in which the guest's vCPUs are made to stand still.
    #[serde(default)]
    pub throttle: u8,
    /// Why the migration failed.
    pub error: Option<String>,
}

/// One precopy pass.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Pass {
    /// Counted from 1.
    pub number: u32,
    /// How long it took, in microseconds.
    pub duration_us: u64,
    /// Pages sent with contents.
    pub normal_pages: u64,
    /// Pages found to be zero.
    pub zero_pages: u64,
    /// Pages dirtied meanwhile.
    pub dirtied_pages: u64,
    /// Pages that the destination lacks after it: what the next pass would send.
    #[serde(default)]
    pub remaining_pages: u64,
    /// Bytes a second while really sending; 0 where too little was sent to tell.
    #[serde(default)]
    pub bandwidth: u64,
    /// Percentage of the time in which the guest's vCPUs were made to stand still.
    #[serde(default)]
    pub throttle: u8,
    /// What was decided after it, and why, in words.
    pub decision: String,
}

impl Pass {
    /// All pages that it has dealt with.
    pub fn sent_pages(&self) -> u64 {
        self.normal_pages + self.zero_pages
    }
}

/// The blackout in its parts, in microseconds, in the order in which they come. Source's clock but for `load_us` and `resume_us`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Downtime {
    /// From the decision until all vCPUs and devices stood still.
    pub stop_us: u64,
    /// Saving devices, vCPUs and VM.
    pub device_state_us: u64,
    /// The last harvest of dirty pages, after the state was saved.
    pub last_sync_us: u64,
    /// Waiting for a person before the switch, if that was asked for. No forecast counts it.
    #[serde(default)]
    pub pre_switchover_us: u64,
    /// Sending what is left (precopy) and the package.
    pub transfer_us: u64,
    /// The destination loading the package, by its own clock.
    pub load_us: u64,
    /// From READY at the source until COMMIT was sent: giving up the right to run.
    pub commit_us: u64,
    /// The destination starting the vCPUs after COMMIT, by its own clock.
    pub resume_us: u64,
    /// From the pause at the source until the source heard RUNNING: an upper bound of the blackout.
    pub total_us: u64,
    /// What it was expected to be when the switch was decided.
    #[serde(default)]
    pub predicted_us: u64,
}

/// Page faults of a postcopy as the destination measured them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Faults {
    /// Pages asked for over the urgent connection because somebody touched them.
    pub requested: u64,
    /// Faults answered without the source: zero pages, or pages that had arrived meanwhile.
    pub local: u64,
    /// Latency of pages that came from the source while somebody waited, from the fault until the page was placed, in microseconds: median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Longest.
    pub max_us: u64,
    /// Pages asked for in advance, behind faults.
    #[serde(default)]
    pub prefetched: u64,
    /// Those of them that are known to have been touched. Of the others it is not known, or they were asked for in vain.
    #[serde(default)]
    pub prefetch_used: u64,
    /// The waits that have ended, in QEMU's measures: average latency of pages that came from the source, in nanoseconds.
    #[serde(default)]
    pub latency_ns: u64,
    /// How many of these latencies lie from 2^N to 2^(N+1) microseconds, for N from 0 to 23. The first and the last count those beyond
    /// as well.
    #[serde(default)]
    pub latency_dist: Vec<u64>,
    /// Time in which all vCPUs waited, in microseconds.
    #[serde(default)]
    pub blocktime_us: u64,
    /// Time in which each vCPU waited on its own thread, in microseconds.
    #[serde(default)]
    pub vcpu_blocktime_us: Vec<u64>,
    /// Average wait of each vCPU, in nanoseconds.
    #[serde(default)]
    pub vcpu_latency_ns: Vec<u64>,
    /// Average wait of all other threads, those of devices and the kernel's for vCPUs, in nanoseconds.
    #[serde(default)]
    pub non_vcpu_latency_ns: u64,
}

impl Faults {
    /// Pages asked for in advance that are not known to have been touched.
    pub fn prefetch_unused(&self) -> u64 {
        self.prefetched.saturating_sub(self.prefetch_used)
    }
}

/// How long devices waited for blocks of copied disks that had not come, as the destination measured it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockWaits {
    /// Blocks that were waited for.
    pub waited: u64,
    /// From the request until the block was in the image, in microseconds: median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Longest.
    pub max_us: u64,
}

/// How a migration would go in one mode, as a dry run found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Forecast {
    /// The mode.
    pub mode: Mode,
    /// Whether it would come to an end.
    pub ends: bool,
    /// Whether a part of RAM would go by postcopy.
    pub postcopy: bool,
    /// Passes of precopy.
    pub passes: u32,
    /// From the command until all of the guest is there, in microseconds; 0 if it does not end.
    pub total_us: u64,
    /// The blackout, in microseconds; if it does not end: the one that would be left.
    pub downtime_us: u64,
    /// Percentage of the time in which the guest's vCPUs would stand still in the end.
    pub throttle: u8,
    /// Why it would end then, or not at all, in words.
    pub reason: String,
}

/// What a finished migration cost. The source has it; `ferry migrate --report` writes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// How it ended.
    pub status: Status,
    /// What was asked for.
    pub mode: Mode,
    /// Whether the rest went by postcopy.
    pub postcopy: bool,
    /// From the command until Done (or the failure), in microseconds.
    pub total_us: u64,
    /// The blackout.
    pub downtime: Downtime,
    /// The passes of precopy.
    pub passes: Vec<Pass>,
    /// Bytes on the wire.
    pub bytes: BytesByKind,
    /// Pages sent with contents.
    pub normal_pages: u64,
    /// Pages that were zero.
    pub zero_pages: u64,
    /// Pages whose contents were compressed.
    #[serde(default)]
    pub compressed_pages: u64,
    /// Bytes that this has saved.
    #[serde(default)]
    pub compression_saved: u64,
    /// Page faults at the destination.
    pub faults: Option<Faults>,
    /// Of copied disks: blocks sent with contents.
    #[serde(default)]
    pub normal_blocks: u64,
    /// Of copied disks: blocks that were zero.
    #[serde(default)]
    pub zero_blocks: u64,
    /// Images at the source that are stale, because the guest writes to their copies now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stale_images: Vec<String>,
    /// Waits for blocks at the destination.
    #[serde(default)]
    pub block_waits: Option<BlockWaits>,
    /// How often the link was lost after the commit and the migration went on over another one.
    #[serde(default)]
    pub recoveries: u32,
    /// Why precopy ended when it did, or which limit was hit, in words.
    pub reason: String,
    /// After a dry run: how each mode would go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forecasts: Vec<Forecast>,
    /// Things that went wrong without harming the guest: bitmaps dropped, for example.
    pub warnings: Vec<String>,
    /// Why it failed.
    pub error: Option<String>,
}
