"""What is measured: which guest, and how it is moved."""

from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30
# Pages a second: 49 MB/s.
BUSY = 12_000
# Bytes a second of a link with a round trip: a gigabit.
LINK_RATE = 125_000_000
# What the monitors and the host need beside the guests' pages.
SPARE = 768 * MIB


@dataclass(frozen=True)
class Scenario:
    name: str
    title: str
    mode: str = "precopy"
    memory: int = GIB
    # Bytes that the guest fills; the rest of its memory was never touched.
    fill: int = 1000 * MIB
    # Pages that it dirties in a second, at random; 0 is none, None as many as it can.
    rate: int | None = 0
    cpus: int = 1
    disk: bool = False
    # 0: the monitor's own choice.
    channels: int = 0
    downtime_ms: int = 10
    # Bytes a second; 0: no limit.
    bandwidth: int = 0
    # Round trip of a link of LINK_RATE, in milliseconds; 0 is loopback.
    round_trip_ms: int = 0
    # Seconds from the end of filling to the guest's last check of all that it wrote: as long as a slow migration takes, and two more.
    run: int = 8
    # Part of `--quick`.
    quick: bool = False
    # Only boots.
    boot: bool = False

    @property
    def cmdline(self):
        """For pagestorm. Its heartbeats must come on time, so it checks and tells nothing until the end of the run."""
        if self.boot:
            return "fill=1M rate=0 verify=0 heartbeat=0"
        rate = "max" if self.rate is None else self.rate
        guest = f"fill={self.fill >> 12 << 2}K rate={rate} order=random verify=0 cpus={self.cpus}"
        disk = " disk=on disk_rate=500" if self.disk else ""
        return f"{guest} heartbeat=1 heartbeat_byte=writes stat=off slow=30 run={self.run}{disk}"

    @property
    def needs(self):
        """Bytes of memory that source and destination take together."""
        return 2 * self.fill + SPARE

    @property
    def rate_limit(self):
        """Bytes a second that nobody can be faster than, whatever the host: those of the link, or of the limit that is set. 0: none."""
        return LINK_RATE if self.round_trip_ms else self.bandwidth

    @property
    def has_least(self):
        """Whether the smallest program that does the same (see `floors postcopy`) can be measured beside it."""
        return self.mode == "postcopy" and self.cpus == 1 and not self.rate_limit


SCENARIOS = [
    Scenario("boot", "from the start of the process to the guest's first byte", memory=128 * MIB, fill=MIB, boot=True, quick=True),
    Scenario("precopy-sparse", "precopy, 2 GiB with 4 MiB touched", memory=2 * GIB, fill=4 * MIB, quick=True),
    Scenario("precopy-idle", "precopy, 1 GiB filled, idle", quick=True),
    Scenario("precopy-idle-2ch", "precopy, 1 GiB filled, idle, 2 channels", channels=2),
    Scenario("precopy-49", "precopy, 49 MB/s dirtied, limit 300 ms", rate=BUSY, downtime_ms=300),
    Scenario("precopy-49-10ms", "precopy, 49 MB/s dirtied, limit 10 ms", rate=BUSY, quick=True),
    Scenario("precopy-49-2cpu", "precopy, 49 MB/s dirtied by 2 vCPUs, limit 10 ms", rate=BUSY, cpus=2),
    Scenario("precopy-max", "precopy, dirtied as fast as it can, limit 10 ms", rate=None),
    Scenario("precopy-disk", "precopy, 49 MB/s dirtied, 500 disk operations a second, limit 10 ms", rate=BUSY, disk=True),
    Scenario("postcopy", "postcopy at once, 12 random pages/ms over 1 GiB", mode="postcopy", rate=BUSY, quick=True),
    Scenario("postcopy-2cpu", "postcopy at once, 12 random pages/ms by 2 vCPUs", mode="postcopy", rate=BUSY, cpus=2),
    Scenario("postcopy-capped", "postcopy, 256 MiB, 125 MB/s cap", mode="postcopy", memory=320 * MIB, fill=256 * MIB, rate=BUSY,
             bandwidth=125_000_000, run=10),
    Scenario("rtt-1ms", "precopy, 512 MiB filled, idle, over 125 MB/s with a round trip of 1 ms", memory=640 * MIB, fill=512 * MIB,
             round_trip_ms=1, run=18),
    Scenario("rtt-20ms", "precopy, 512 MiB filled, idle, over 125 MB/s with a round trip of 20 ms", memory=640 * MIB, fill=512 * MIB,
             round_trip_ms=20, downtime_ms=50, run=18),
    Scenario("precopy-idle-4g", "precopy, 4 GiB filled, idle", memory=4 * GIB, fill=4000 * MIB, run=14),
    Scenario("precopy-idle-12g", "precopy, 12 GiB of which 8 are filled, idle", memory=12 * GIB, fill=8000 * MIB, run=24),
    Scenario("postcopy-12g", "postcopy, 12 GiB of which 8 are filled, 49 MB/s", mode="postcopy", memory=12 * GIB, fill=8000 * MIB,
             rate=BUSY, run=24),
]
