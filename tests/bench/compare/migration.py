"""One migration, measured from outside, and by what the guest says."""

import os
import threading
import time
from contextlib import ExitStack

import guest
import host
from vmm import Guest
from warm import SPARE, Warm

GIB = 1 << 30
# Of a guest with less than this, what its bytes cost cannot be seen.
WORTH_DIVIDING = 64 << 20
DISK = 256 << 20
LIMIT = 120
# What a migration itself takes of memory is given back soon after its end, by each monitor in its own time.
SETTLED = 0.1


def migrate(vmm, scenario, floors, link):
    """Moves a guest as the scenario says; returns what was measured, by name."""
    with ExitStack() as parts:
        disk = None
        if scenario.disk:
            disk = os.path.join(vmm.directory, "disk")
            with open(disk, "wb") as file:
                file.truncate(DISK)
            parts.callback(os.unlink, disk)
        machine = Guest(scenario.memory, scenario.cpus, scenario.cmdline, disk)
        # The source fills its memory before this is released.
        warm = Warm(floors, 2 * scenario.fill + SPARE, beside=scenario.fill + SPARE)
        parts.callback(warm.close)
        source = vmm.run(machine, link)
        parts.callback(source.close)
        source.console.wait("pagestorm: filled")
        destination = vmm.receive(machine, link)
        parts.callback(destination.close)
        begin = vmm.migrate(scenario, source, destination, link)
        warm.release()
        began = time.monotonic()
        try:
            return _measure(vmm, scenario, source, destination, begin)
        except (OSError, RuntimeError) as error:
            said = "\n".join(line for side in (source, destination) for _, line in side.console.lines)
            guest.refuse_damage(said)
            if isinstance(error, TimeoutError) or any("final=1" in line for _, line in source.console.lines):
                raise guest.Unfinished(f"{time.monotonic() - began:.0f} s") from error
            raise RuntimeError(f"{error}\n{source.said()}{destination.said()}".strip()) from error


def _measure(vmm, scenario, source, destination, begin):
    result = {"source_beside_mb": source.memory() / 1e6}
    used = source.cpu() + destination.cpu()
    stop = threading.Event()
    # The source's process, and with it its threads, may end with the migration.
    watch = threading.Thread(target=lambda: [None for _ in iter(lambda: stop.wait(0.01), True) if source.look_at_vcpus()])
    watch.start()
    steal = host.Steal()
    began = time.monotonic()
    try:
        begin()
        ended = source.qmp.wait_migrated(LIMIT)
        ended = max(ended, destination.qmp.wait_migrated(LIMIT))
    finally:
        stop.set()
        watch.join()
    result["steal"] = steal.part()
    used = source.cpu() + destination.cpu() - used
    time.sleep(SETTLED)
    result |= {"total_ms": (ended - began) * 1e3, "cpu_s": used, "beside_mb": destination.memory() / 1e6}
    if scenario.fill >= WORTH_DIVIDING:
        result["cpu_s_per_gib"] = used / (scenario.fill / GIB)
    result |= vmm.said(source, destination)
    if "sent_mb" in result:
        result["mb_per_s"] = result["sent_mb"] / (ended - began)
    # All that the guest ever wrote is as it wrote it, the guest finds.
    guest.check_verdict(destination.console)
    result |= guest.heartbeats(source.console, destination.console, began, ended, scenario.rate)
    return result | guest.slow_accesses(destination.console)
