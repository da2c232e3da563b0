"""One migration, measured from outside, and by what the guest says."""

import os
import re
import subprocess
import threading
import time
from dataclasses import dataclass

GIB = 1 << 30
# Memory is given back to a host that lent it two seconds after it became free.
HELD = 2.3
# Beside what the guest filled.
SPARE = 128 << 20
HEARTBEATS_PER_SECOND = 1000
MIGRATION_LIMIT = 120


@dataclass(frozen=True)
class Guest:
    memory: int
    cpus: int
    cmdline: str
    disk: str | None


def free_memory():
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemAvailable"))


class Warm:
    """Holds so much memory, touched, so that it is this machine's own when it is free again: its first touch would cost ten times what it
    does elsewhere."""

    def __init__(self, floors, size):
        command = [floors, "warm", str(max(0, min(size, free_memory() - SPARE)))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._process.stdout.readline()
        self._touched = time.monotonic()

    def release(self):
        threading.Event().wait(self._touched + HELD - time.monotonic())
        self.close()

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def migrate(vmm, scenario, floors, link=None):
    """Moves a guest as the scenario says; returns what was measured, by name."""
    disk = os.path.join(vmm.directory, "disk") if scenario.disk else None
    if disk:
        with open(disk, "wb") as file:
            file.truncate(256 << 20)
    guest = Guest(scenario.memory, scenario.cpus, scenario.cmdline, disk)
    source = destination = warm = None
    try:
        warm = Warm(floors, 2 * scenario.fill + SPARE)
        source = vmm.run(guest)
        source.console.wait("pagestorm: filled")
        destination = vmm.receive(guest)
        begin = vmm.migrate(scenario, source, destination)
        warm.release()
        return _measure(vmm, scenario, source, destination, begin)
    finally:
        for part in (warm, source, destination):
            if part:
                part.close()
        if disk:
            os.unlink(disk)


def _measure(vmm, scenario, source, destination, begin):
    used = source.cpu() + destination.cpu()
    said = source.console.now()
    stop = threading.Event()
    # The source's process, and with it its threads, may end with the migration.
    watch = threading.Thread(target=lambda: [None for _ in iter(lambda: stop.wait(0.01), True) if source.look_at_vcpus()])
    watch.start()
    began = time.monotonic()
    try:
        begin()
        ended = source.qmp.wait_migrated(MIGRATION_LIMIT)
        ended = max(ended, destination.qmp.wait_migrated(MIGRATION_LIMIT))
    finally:
        stop.set()
        watch.join()
    used = source.cpu() + destination.cpu() - used
    memory = destination.memory()
    # All that the guest ever wrote is as it wrote it, the guest finds.
    destination.console.wait("verdict ok .* final=1|verdict ok .*final=1", timeout=60)
    result = {"total_ms": (ended - began) * 1e3, "cpu_s_per_gib": used / (scenario.fill / GIB), "beside_mb": memory / 1e6}
    result |= _heartbeats(scenario, source, destination, began, ended)
    result |= _slow(source, destination, said)
    return result


def _heartbeats(scenario, source, destination, began, ended):
    beats = sorted(source.console.beats + destination.console.beats)
    around = [beat for beat in beats if began - 0.05 <= beat[0] <= ended + 0.2]
    holes = [later[0] - earlier[0] for earlier, later in zip(around, around[1:])]
    during = sum(writes for at, writes in beats if began <= at <= ended)
    result = {"gap_ms": max(holes) * 1e3}
    if scenario.rate:
        result["progress"] = during / (ended - began) / scenario.rate
    return result


def _slow(source, destination, said):
    """Percentiles of the guest's accesses that took longer than 30 us, from the second in which the migration began on."""
    counts = {}
    for _, line in source.console.lines[said:] + destination.console.lines:
        if match := re.match(r"slow cpu=\d+ seq=\d+ us=(.*)", line):
            for pair in filter(None, match[1].split(",")):
                us, count = map(int, pair.split(":"))
                counts[us] = counts.get(us, 0) + count
    total = sum(counts.values())
    if not total:
        return {}
    result, seen, wanted = {"slow_count": total}, 0, {"slow_p50_ms": 0.5, "slow_p99_ms": 0.99, "slow_max_ms": 1.0}
    for us in sorted(counts):
        seen += counts[us]
        for name, part in list(wanted.items()):
            if seen >= part * total:
                result[name] = us / 1e3
                del wanted[name]
    return result
