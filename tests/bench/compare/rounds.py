"""A scenario over several rounds, each monitor in turn: what changes on the host meanwhile meets all of them."""

import json
import statistics
import subprocess
from dataclasses import dataclass

import host
import link
from boot import boot
from guest import Damage, Unfinished
from migration import migrate
from scenarios import LINK_RATE
from warm import SPARE, Warm

# Of the processors' time: with more of it gone to other machines a run says little.
DISTURBED = 0.05
# How often the floor is measured in a round; the best counts. But once over a link, whose rate is known.
FLOORS = 3


@dataclass(frozen=True)
class Programs:
    """Of this benchmark: the floors and the relay."""

    floors: str
    relay: str


def why_not(scenario):
    """Why this scenario cannot be measured here; None if it can."""
    if scenario.round_trip_ms and (reason := link.impossible()):
        return reason
    available = host.available_memory()
    if available < scenario.needs:
        return f"needs {scenario.needs / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
    return None


def measure(scenario, vmms, programs, rounds, say):
    """All rounds of one scenario. `say` shows how it goes on."""
    result = {"name": scenario.name, "title": scenario.title, "skipped": why_not(scenario), "floor": [], "least": []}
    result["runs"] = {vmm.name: [] for vmm in vmms}
    say(f"{scenario.name}: {scenario.title}")
    if result["skipped"]:
        say(f"  NOT RUN: {result['skipped']}")
        return result
    for number in range(1, rounds + 1):
        between = link.Loopback()
        if scenario.round_trip_ms:
            between = link.Link(programs.relay, scenario.round_trip_ms, LINK_RATE)
        try:
            if not scenario.boot:
                floor = measure_floor(scenario, programs, between)
                result["floor"].append(floor)
                say(f"  round {number} of {rounds}, floor: {describe(floor)}")
            if scenario.has_least:
                least = measure_least(scenario, programs)
                result["least"].append(least)
                say(f"  round {number} of {rounds}, least program: {describe(least)}")
            for vmm in vmms:
                run = measure_run(scenario, vmm, programs, between)
                result["runs"][vmm.name].append(run)
                say(f"  round {number} of {rounds}, {vmm.name}: {describe(run)}")
        finally:
            between.close()
    return result


def measure_floor(scenario, programs, between):
    """As many bytes as the guest filled, from memory to memory over one TCP connection; but no faster than the scenario allows."""
    Warm(programs.floors, 2 * scenario.fill + SPARE).release()
    command = ["tcp", "huge", str(scenario.fill)]
    if scenario.round_trip_ms:
        command = ["link", str(scenario.fill), *between.paths, between.address]
    steal = host.Steal()
    # What the host can do at best is not what it does when the scheduler is late.
    tries = 1 if scenario.round_trip_ms else FLOORS
    runs = (subprocess.run([programs.floors, *command], capture_output=True, check=True) for _ in range(tries))
    said = min((json.loads(run.stdout) for run in runs), key=lambda said: said["seconds"])
    seconds = max(said["seconds"], scenario.fill / scenario.rate_limit if scenario.rate_limit else 0)
    return {"total_ms": seconds * 1e3, "cpu_s": said["cpu_seconds"], "steal": steal.part()}


def measure_least(scenario, programs):
    """The same postcopy by the smallest program that does it: userfaultfd and two TCP connections, without a guest and without a protocol."""
    Warm(programs.floors, 2 * scenario.fill + SPARE).release()
    steal = host.Steal()
    command = [programs.floors, "postcopy", str(scenario.fill), str(scenario.rate)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        return {"failed": run.stderr.strip() or f"exit status {run.returncode}"}
    said = json.loads(run.stdout)
    return {"total_ms": said.pop("seconds") * 1e3, **said, "steal": steal.part()}


def measure_run(scenario, vmm, programs, between):
    try:
        run = boot(vmm, scenario, between) if scenario.boot else migrate(vmm, scenario, programs.floors, between)
    except Damage as damage:
        return {"damage": str(damage)}
    except Unfinished as unfinished:
        return {"unfinished": str(unfinished)}
    except (OSError, RuntimeError, KeyError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return run | {"disturbed": run["steal"] > DISTURBED}


def describe(run):
    """A run in a few words."""
    if "damage" in run:
        return f"THE GUEST FOUND DAMAGE: {run['damage']}"
    if "unfinished" in run:
        return f"did not move in time ({run['unfinished']})"
    if "failed" in run:
        return f"FAILED: {run['failed']}"
    parts = [f"{run[key]:.1f} ms{name}" for key, name in (("boot_ms", ""), ("total_ms", ""), ("blackout_ms", " blackout")) if key in run]
    return f"{', '.join(parts)}, steal {run['steal']:.1%}"


def summarise(result):
    """Median, least and most of everything that was measured, over all runs that have it."""
    groups = dict(result["runs"], floor=result["floor"], least=result["least"])
    return {name: spread(runs) for name, runs in groups.items()}


def spread(runs):
    names = sorted({key for run in runs for key, value in run.items() if isinstance(value, (int, float)) and not isinstance(value, bool)})
    values = {name: [run[name] for run in runs if name in run] for name in names}
    return {name: {"median": statistics.median(all), "min": min(all), "max": max(all)} for name, all in values.items()}
