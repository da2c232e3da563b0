"""What tables show of the values that were measured, in this order, and what they mean."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    key: str
    title: str
    unit: str
    meaning: str
    # Whether dividing one monitor's by the other's says anything.
    ratio: bool = True

    @property
    def label(self):
        return f"{self.title}, {self.unit}" if self.unit else self.title


METRICS = [
    Metric("boot_ms", "boot", "ms", "from the start of the process to the first byte on the guest's console; median of 5 starts a round"),
    Metric("total_ms", "total", "ms", "from the command to the completion on both sides"),
    Metric("blackout_ms", "blackout", "ms", "from the last heartbeat at the source to the first at the destination; they are 1 ms apart"),
    Metric("said_downtime_ms", "its own downtime", "ms", "what the monitor itself calls the blackout"),
    Metric("largest_hole_ms", "largest hole", "ms", "the longest time without a heartbeat in the migration, be it the blackout or a stall"),
    Metric("progress", "guest's progress", "", "pages that the guest dirtied during the migration, to those that it should have"),
    Metric("slow_count", "slow writes", "", "of the guest's writes to its pages, those that took longer than 30 us", ratio=False),
    Metric("slow_p50_ms", "slow writes, p50", "ms", "how long the slow ones took: half of them no longer than this, and so on"),
    Metric("slow_p99_ms", "slow writes, p99", "ms", ""),
    Metric("slow_max_ms", "slow writes, max", "ms", ""),
    Metric("sent_mb", "sent", "MB", "bytes on the wire as the monitor counts them"),
    Metric("mb_per_s", "sent / total", "MB/s", ""),
    Metric("cpu_s", "CPU", "s", "processor time of both sides, without that of vCPUs"),
    Metric("cpu_s_per_gib", "CPU / GiB", "s", "the same for each GiB that the guest filled"),
    Metric("source_beside_mb", "memory, source", "MB", "resident beside the guest's RAM before the migration, with program and libraries"),
    Metric("beside_mb", "memory, destination", "MB", "the same at the destination after the migration"),
    Metric("steal", "steal", "%", "processors' time that this machine's host kept, in ticks of 10 ms; over 5 % a run says little", False),
]
