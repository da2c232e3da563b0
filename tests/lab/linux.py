#!/usr/bin/env python3
"""Linux guests, a stock Debian kernel and a tiny one, on two emulated hosts: they boot, hear the power button, restart,
and move, running, in every mode, and their agent finds nothing wrong with memory, disk and clocks.

One line for each check; exit status 0 if all passed. Guests and Ferry are built first.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from hosts import ROOT, Failed, Pair

BLOCK = 64 << 10  # the bitmap's granularity
BOOT, MOVE, END = 180, 120, 120  # seconds that each may take on a busy machine
# Host b's wall clock, which must not become the guest's.
HOUR = 3600


def run_here(*command):
    subprocess.run(command, cwd=ROOT, check=True)


class Guest:
    """A guest and the Ferry that has it."""

    def __init__(self, host, kernel, initrd, disk, options=""):
        self.host = host
        self.seq, self.clocks = -1, None
        self.job = host.start(
            f"ferry run --kernel /g/{kernel} --initrd /g/{initrd} --cpus 2 --memory 256M --disk path={disk},id=d "
            f"--qmp /tmp/guest --cmdline 'console=ttyS0 quiet agent.memory=16 agent.threads=2 {options}'")

    def control(self, command, seconds=60):
        return self.host.run(f"ferry {command} --qmp /tmp/guest", seconds)

    def agent(self, kind, seconds, what=lambda fields: True):
        """The agent's next line of a kind; a line that tells of a failure ends the test."""
        def matches(line):
            fields = line.json()
            if fields.get("agent") == "failure" or fields.get("ok") is False:
                raise Failed(f"the guest at {self.host.name} says: {line.text}")
            return fields if fields.get("agent") == kind and what(fields) else None
        line, fields = self.job.expect(matches, seconds)
        return line, fields

    def ticks(self, count, seconds):
        """Waits for heartbeats and compares the guest's clocks with this machine's. A line can be late on its way here, never early:
        of some heartbeats the best is right."""
        clocks = []
        for _ in range(count):
            line, tick = self.agent("tick", seconds)
            if tick["seq"] <= self.seq:
                raise Failed(f"heartbeat {tick['seq']} after {self.seq}")
            self.seq = tick["seq"]
            clocks.append((tick["mono_ms"] / 1000 - line.monotonic, tick["wall_ms"] / 1000 - line.wall))
        best = [max(clock) for clock in zip(*clocks)]
        if self.clocks and count > 1:
            for name, now, before in zip(["monotonic", "wall"], best, self.clocks):
                if abs(now - before) > 1.5:
                    raise Failed(f"the guest's {name} clock has moved by {now - before:.1f} s against this machine's")
        if abs(best[1]) > 5:
            raise Failed(f"the guest's wall clock is wrong by {best[1]:.1f} s")
        self.clocks = self.clocks or best

    def resume(self):
        """Ends a pause, during which the guest's monotonic clock stood still."""
        self.job.drain()
        self.control("resume")
        self.agent("tick", MOVE)
        self.clocks = None

    def move(self, host, mode, options=""):
        """Moves the guest; gives the report. The source's Ferry must end well."""
        source, source_job = self.host, self.job
        receive = host.start("ferry receive --listen tcp:0.0.0.0:7000 --qmp /tmp/guest")
        receive.expect(lambda line: "waiting for a guest" in line.text, MOVE)
        source.run(f"ferry migrate --qmp /tmp/guest --mode {mode} {options} --report /tmp/report tcp:{host.address}:7000", MOVE)
        report = json.loads("".join(source.run("cat /tmp/report")))
        # What the guest said before it went, failures included.
        self.read_to_the_end(source_job)
        source_job.wait(MOVE)
        self.host, self.job = host, receive
        if mode != "auto" and report["postcopy"] != (mode == "postcopy"):
            raise Failed(f"mode {mode}, but the report says postcopy: {report['postcopy']}")
        return report

    def read_to_the_end(self, job):
        deadline = time.monotonic() + MOVE
        while line := job.next_line(deadline):
            fields = line.json()
            if fields.get("agent") == "failure" or fields.get("ok") is False:
                raise Failed(f"the guest at {self.host.name} says: {line.text}")
            if fields.get("agent") == "tick":
                self.seq = fields["seq"]

    def power_off(self):
        """Presses the power button: the last verdict must be good, and so must Ferry's exit status."""
        self.control("powerdown")
        _, verdict = self.agent("verdict", END)
        if verdict["reason"] != "power_button":
            raise Failed(f"the agent ended by {verdict['reason']}, not by the power button")
        self.job.wait(END)


class Checks:
    """Names and counts."""

    def __init__(self):
        self.passed = self.failed = 0
        self.lock = threading.Lock()

    def run(self, name, check, *arguments):
        """Runs a check; gives whether it passed. It may give something to tell."""
        begin = time.monotonic()
        try:
            said = check(*arguments)
            result = f"ok      {name}" + (f": {said}" if said else "")
        except (Failed, OSError, subprocess.CalledProcessError) as error:
            result = f"FAILED  {name}: {error}"
        good = result.startswith("ok")
        with self.lock:
            self.passed, self.failed = self.passed + good, self.failed + (not good)
            print(f"{result} ({time.monotonic() - begin:.1f} s)", flush=True)
        return good


def end_all(*hosts):
    """Ends what a failed check left running."""
    for host in hosts:
        host.run("ferry quit --qmp /tmp/guest; for i in $(seq 100); do pidof ferry >/dev/null || break; sleep 0.2; done; true")


def run_on(checks, host, name, check, *arguments):
    """A check of one guest on one host."""
    if not checks.run(name, check, host, *arguments):
        end_all(host)


def clean(image):
    """The guest's file system is as a power-off leaves it."""
    result = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True)
    if result.returncode != 0:
        raise Failed(f"e2fsck: {result.stdout.strip()}")


def boots_and_powers_off(host, kernel, initrd, disk, image):
    guest = Guest(host, kernel, initrd, disk)
    _, start = guest.agent("start", BOOT)
    if start["cpus"] != 2 or start["clocksource"] != "kvm-clock" or not start["power_button"]:
        raise Failed(f"not the machine that was asked for: {start}")
    guest.ticks(2, BOOT)
    guest.power_off()
    clean(image)


def restarts(host, disk, image):
    guest = Guest(host, "bzImage-tiny", "initramfs-tiny.cpio.gz", disk, "agent.run=1 end=reboot")
    guest.agent("verdict", BOOT)
    guest.agent("start", BOOT)
    guest.agent("verdict", BOOT)
    guest.control("quit")
    guest.job.wait(END)


def snapshot(guest, image):
    """The disk's bytes of a paused guest."""
    guest.host.run("sync")
    return image.read_bytes()


def dirty_bytes(guest):
    """What the guest's bitmap says."""
    for line in guest.control("bitmap list"):
        if match := re.fullmatch(r"d\s+backup\s+65536\s+(\d+)\s+recording", line):
            return int(match[1])
    raise Failed(f"no bitmap at {guest.host.name}")


def bitmap_fits(guest, image, before):
    """Every changed block is dirty, and next to no others: of what was written, little stays as it was."""
    after = snapshot(guest, image)
    changed = sum(before[at:at + BLOCK] != after[at:at + BLOCK] for at in range(0, len(after), BLOCK))
    dirty = dirty_bytes(guest) // BLOCK
    if not 10 < changed <= dirty <= changed + 4:
        raise Failed(f"{changed} blocks have changed, {dirty} are dirty")
    return f"{changed} blocks changed, {dirty} dirty"


def describe(report):
    faults = (report.get("faults") or {}).get("requested", 0)
    return f"{report['total-us'] / 1e6:.2f} s, downtime {report['downtime']['total-us'] / 1e3:.0f} ms, {faults} faults"


class Moves:
    """A guest that moves between a and b, and back, with a bitmap."""

    def __init__(self, pair, kernel, initrd, image):
        self.pair, self.image = pair, image
        self.guest = Guest(pair.a, kernel, initrd, "/dev/vda")
        self.before = None

    def boot(self):
        self.guest.ticks(3, BOOT)
        self.guest.control("pause")
        self.before = snapshot(self.guest, self.image)
        self.guest.control("bitmap add d backup")
        self.guest.resume()
        self.guest.ticks(3, MOVE)

    def move(self, mode, options=""):
        there = self.pair.b if self.guest.host is self.pair.a else self.pair.a
        report = self.guest.move(there, mode, options)
        self.guest.ticks(3, MOVE)
        return describe(report)

    def compare(self):
        self.guest.control("pause")
        return bitmap_fits(self.guest, self.image, self.before)

    def move_paused(self):
        """Nothing is written on the way: the bitmap must arrive as it was."""
        expected = dirty_bytes(self.guest)
        there = self.pair.b if self.guest.host is self.pair.a else self.pair.a
        report = self.guest.move(there, "postcopy")
        if (arrived := dirty_bytes(self.guest)) != expected:
            raise Failed(f"{expected} bytes were dirty, {arrived} are")
        if not any("paused" in line for line in self.guest.control("status")):
            raise Failed("the guest was paused and is not any more")
        self.guest.resume()
        self.guest.ticks(3, MOVE)
        return describe(report)

    def end(self):
        self.guest.power_off()
        clean(self.image)


def moves(checks, pair, name, image, kernel, initrd):
    """A failed check ends the guest's journey, as the others have nothing to start from, and counts for them all."""
    guest = Moves(pair, kernel, initrd, image)
    steps = [
        ("boots at a", guest.boot),
        ("a to b, auto", guest.move, "auto"),
        ("b to a, postcopy", guest.move, "postcopy"),
        # Generous, because an emulated host that waits for its processor sends slowly, and precopy never gives in.
        ("a to b, precopy", guest.move, "precopy", "--downtime 3s"),
        ("its bitmap at b has what was written", guest.compare),
        ("b to a, paused", guest.move_paused),
        ("powers off, all well", guest.end),
    ]
    for number, (step, *call) in enumerate(steps):
        if not checks.run(f"{name}: {step}", *call):
            end_all(pair.a, pair.b)
            checks.failed += len(steps) - number - 1
            return


def in_parallel(*calls):
    threads = [threading.Thread(target=call, args=arguments) for call, *arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main():
    run_here("cargo", "build", "--quiet", "--locked")
    run_here("scripts/guest-linux", "--tiny")
    begin = time.monotonic()
    checks = Checks()
    guests = ROOT / "target/guest/linux"
    names = ["bzImage-debian", "initramfs-debian.cpio.gz", "bzImage-tiny", "vmlinux-tiny", "initramfs-tiny.cpio.gz"]
    files = [f"{ROOT}/target/debug/ferry:/bin/ferry"] + [f"{guests / name}:/g/{name}" for name in names]
    with tempfile.TemporaryDirectory(prefix="lab-test.") as directory:
        images = [Path(directory) / name for name in ("shared", "a", "b")]
        for image in images:
            shutil.copy(guests / "disk.img", image)
        shared, image_a, image_b = images
        with Pair(files, images, seconds=1800) as pair:
            def on_b():
                tiny = "initramfs-tiny.cpio.gz"
                run_on(checks, pair.b, "tiny bzImage restarts", restarts, "/dev/vdc", image_b)
                for kernel, how in [("bzImage-tiny", "bzImage"), ("vmlinux-tiny", "vmlinux by PVH")]:
                    name = f"tiny {how} boots and powers off"
                    run_on(checks, pair.b, name, boots_and_powers_off, kernel, tiny, "/dev/vdc", image_b)

            in_parallel(
                (on_b,),
                (run_on, checks, pair.a, "stock Debian bzImage boots and powers off", boots_and_powers_off,
                 "bzImage-debian", "initramfs-debian.cpio.gz", "/dev/vdb", image_a))
            moves(checks, pair, "stock Debian", shared, "bzImage-debian", "initramfs-debian.cpio.gz")
            pair.b.run(f"date -s @{time.time() + HOUR:.0f}")
            moves(checks, pair, "tiny, b's clock wrong", shared, "bzImage-tiny", "initramfs-tiny.cpio.gz")
    print(f"lab: {checks.passed} passed, {checks.failed} failed ({time.monotonic() - begin:.0f} s)")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
