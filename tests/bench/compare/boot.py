"""How long a monitor takes from the start of its process to the first byte that its guest writes."""

import statistics

import host
from vmm import Guest

# A start takes so little time that the host's mood matters more than with a migration.
STARTS = 5


def boot(vmm, scenario, link):
    """The median of a few starts; pagestorm prints its first line before it touches much memory."""
    steal = host.Steal()
    times = []
    for _ in range(STARTS):
        process = vmm.run(Guest(scenario.memory, scenario.cpus, scenario.cmdline), link)
        try:
            process.console.wait("pagestorm: boot")
            times.append((process.console.first_byte - process.began) * 1e3)
        finally:
            process.close()
    return {"boot_ms": statistics.median(times), "steal": steal.part()}
