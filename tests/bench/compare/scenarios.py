"""What is measured: which guest, and how it is moved."""

from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30
# Pages a second.
BUSY = 12_000


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
    # Seconds from the end of filling to the guest's last check of all that it wrote.
    run: int = 5

    @property
    def cmdline(self):
        rate = "max" if self.rate is None else self.rate
        disk = " disk=on disk_rate=500" if self.disk else ""
        fill = f"fill={self.fill >> 12 << 2}K"
        return f"{fill} rate={rate} order=random verify=0 cpus={self.cpus} heartbeat=1 heartbeat_byte=writes slow=30 run={self.run}{disk}"


SCENARIOS = [
    Scenario("precopy-idle", "precopy, 1 GiB filled, idle"),
    Scenario("precopy-idle-2ch", "the same, 2 channels", channels=2),
    Scenario("precopy-49", "precopy, 49 MB/s dirtied, limit 300 ms", rate=BUSY, downtime_ms=300),
    Scenario("precopy-49-10ms", "the same, limit 10 ms", rate=BUSY),
    Scenario("precopy-max", "precopy, dirtied as fast as it can, limit 10 ms", rate=None),
    Scenario("precopy-sparse", "precopy, 2 GiB with 4 MiB touched", memory=2 * GIB, fill=4 * MIB),
    Scenario("precopy-49-2cpu", "precopy, 49 MB/s dirtied by 2 vCPUs, limit 10 ms", rate=BUSY, cpus=2),
    Scenario("precopy-disk", "precopy, 49 MB/s dirtied, 500 disk operations a second, limit 10 ms", rate=BUSY, disk=True),
    Scenario("postcopy", "postcopy at once, 12 random pages/ms over 1 GiB", mode="postcopy", rate=BUSY),
    Scenario("postcopy-2cpu", "the same with 2 vCPUs", mode="postcopy", rate=BUSY, cpus=2),
    Scenario("postcopy-capped", "postcopy, 256 MiB, 125 MB/s cap", mode="postcopy", memory=320 * MIB, fill=256 * MIB, rate=BUSY,
             bandwidth=125_000_000, run=7),
    Scenario("precopy-idle-4g", "precopy, 4 GiB filled, idle", memory=4 * GIB, fill=4000 * MIB, run=7),
    Scenario("precopy-idle-12g", "precopy, 12 GiB of which 8 are filled, idle", memory=12 * GIB, fill=8000 * MIB, run=12),
    Scenario("postcopy-12g", "postcopy, 12 GiB of which 8 are filled, 49 MB/s", mode="postcopy", memory=12 * GIB, fill=8000 * MIB, rate=BUSY,
             run=14),
]
