"""Compares Ferry with QEMU, side by side: scripts/bench builds what this needs and runs it."""

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
import tempfile

import chart
import ferry
import host
import qemu
import table
from rounds import Programs, measure, summarise
from scenarios import SCENARIOS


def arguments():
    names = [scenario.name for scenario in SCENARIOS]
    what = "Compares Ferry with Debian's QEMU: both migrate the same guest in turn."
    parser = argparse.ArgumentParser(prog="scripts/bench", description=what)
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each scenario is run with each monitor (default: 5)")
    parser.add_argument("--only", action="append", metavar="SCENARIO", choices=names, help="just this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="one round of a few short scenarios")
    parser.add_argument("--list", action="store_true", help="name the scenarios, and run none")
    parser.add_argument("--json", metavar="FILE", default="target/bench/results.json", help="where the results go (default: %(default)s)")
    parser.add_argument("--svg", metavar="FILE", default="target/bench/results.svg", help="where the picture goes (default: %(default)s)")
    parser.add_argument("--ferry", metavar="BINARY", default="target/release/ferry", help="another Ferry than the one that is built here")
    parser.add_argument("--qemu", metavar="BINARY", default="qemu-system-x86_64", help="another QEMU than Debian's")
    # What scripts/bench has built.
    for name in ("kernel", "floors", "relay"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.error("--rounds: at least one")
    if not chosen.list:
        for name in ("ferry", "qemu", "kernel", "floors", "relay"):
            path = getattr(chosen, name) or ""
            # A name without a directory is one in PATH, for QEMU; a file that is here comes first.
            found = os.path.abspath(path) if os.path.isfile(path) else shutil.which(path)
            if not found:
                parser.error(f"--{name}: there is no program {path!r}")
            setattr(chosen, name, found)
    chosen.rounds = chosen.rounds or (1 if chosen.quick else 5)
    return chosen


def say(text):
    print(text, file=sys.stderr, flush=True)


def stop(number, _):
    """Ends everything that was started, by way of the clean-ups; which another signal does not disturb."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def run(chosen, scenarios):
    with tempfile.TemporaryDirectory(prefix="ferry-bench-") as directory:
        kinds = ((ferry.Vmm, chosen.ferry), (qemu.Vmm, chosen.qemu))
        vmms = [kind(binary, chosen.kernel, directory) for kind, binary in kinds]
        results = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "rounds": chosen.rounds}
        results["host"] = host.describe()
        results["vmms"] = {vmm.name: {"version": host.version_of(vmm.binary), "size": host.size_of(vmm.binary)} for vmm in vmms}
        results["scenarios"] = []
        for scenario in scenarios:
            result = measure(scenario, vmms, Programs(chosen.floors, chosen.relay), chosen.rounds, say)
            if not result["skipped"]:
                result["summary"] = summarise(result)
            results["scenarios"].append(result)
            # After each scenario: an interrupted benchmark has measured something, too.
            write(chosen.json, json.dumps(results, indent=1) + "\n")
            write(chosen.svg, chart.render(results))
    return results


def write(path, text):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as file:
        file.write(text)


def main():
    chosen = arguments()
    scenarios = [s for s in SCENARIOS if (not chosen.only or s.name in chosen.only) and (not chosen.quick or s.quick or chosen.only)]
    if chosen.list:
        for scenario in scenarios:
            print(f"{scenario.name:18} {scenario.title}{' (quick)' if scenario.quick else ''}")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    results = run(chosen, scenarios)
    print(table.render(results))
    say(f"results: {chosen.json}, picture: {chosen.svg}")
    runs = [run for result in results["scenarios"] for runs in result["runs"].values() for run in runs]
    if any("damage" in run for run in runs):
        say("A GUEST FOUND DAMAGE, see above")
    return 1 if any({"damage", "failed"} & run.keys() for run in runs) else 0


sys.exit(main())
