"""A Linux guest that a test boots on one of two emulated hosts and moves to the other, and what the tests count."""

import json
import subprocess
import threading
import time

from hosts import ROOT, Failed

BOOT, MOVE, END = 180, 120, 120  # seconds that each may take on a busy machine


def run_here(*command):
    subprocess.run(command, cwd=ROOT, check=True)


class Guest:
    """A guest and the Ferry that has it."""

    def __init__(self, host, kernel, initrd, disk, options="", more=""):
        """`disk` is its first one; `options` go to its kernel and agent, `more` to `ferry run`."""
        self.host = host
        self.seq, self.clocks = -1, None
        self.job = host.start(
            f"ferry run --kernel /g/{kernel} --initrd /g/{initrd} --cpus 2 --memory 256M --disk path={disk},id=d {more} "
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

    def receiver(self, host):
        """A Ferry at `host` that waits for a guest."""
        job = host.start("ferry receive --listen tcp:0.0.0.0:7000 --qmp /tmp/guest")
        job.expect(lambda line: "waiting for a guest" in line.text, MOVE)
        return job

    def migration(self, command, host, options):
        """The command line that moves the guest to `host`, or goes on with that."""
        return f"ferry {command} --qmp /tmp/guest {options} tcp:{host.address}:7000"

    def move(self, host, mode, options=""):
        """Moves the guest; gives the report."""
        receiver = self.receiver(host)
        self.host.run(self.migration("migrate", host, f"--mode {mode} {options} --report /tmp/report"), MOVE)
        report = self.moved(host, receiver)
        if mode != "auto" and report["postcopy"] != (mode == "postcopy"):
            raise Failed(f"mode {mode}, but the report says postcopy: {report['postcopy']}")
        return report

    def moved(self, host, receiver):
        """The guest has gone to `host`; gives the report. The source's Ferry must end well."""
        source, source_job = self.host, self.job
        report = json.loads("".join(source.run("cat /tmp/report")))
        # What the guest said before it went, failures included.
        self.read_to_the_end(source_job)
        source_job.wait(MOVE)
        self.host, self.job = host, receiver
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


# What can be told of a guest from outside, twice, so that it shows what stands still.
THREADS = ("for p in $(pidof ferry); do for t in /proc/$p/task/*; do "
           "echo $(cat $t/comm $t/wchan $t/schedstat) $(grep State $t/status); done; done")
COUNTERS = ("mount -t debugfs none /sys/kernel/debug 2>/dev/null; cd /sys/kernel/debug/kvm && for d in */vcpu*; do "
            "echo $d: $(cd $d && for f in *; do echo $f=$(head -n 1 $f); done | grep -v '=0$'); done")
# A pause and its end repeat the disks' interrupts.
LOOK = ["ferry status --qmp /tmp/guest", "cat /proc/uptime /proc/loadavg", THREADS, COUNTERS, "sleep 2", THREADS, COUNTERS,
        "ferry pause --qmp /tmp/guest; ferry resume --qmp /tmp/guest", "sleep 2", THREADS, COUNTERS]


def look_at(host):
    """Prints how things stand at a host where a check has failed."""
    for command in LOOK:
        try:
            lines = host.run(f"{command}; true", 30)
        except Failed as error:
            lines = [str(error)]
        for line in lines:
            print(f"{host.name}> {line}", flush=True)
    for job in host.jobs:
        if job.status is None:
            job.drain()
            print(f"{job.command}: by now its last lines are: {job.tail()}", flush=True)


def end_all(*hosts):
    """Tells of what a failed check left running, and ends it."""
    for host in hosts:
        look_at(host)
        host.run("ferry quit --qmp /tmp/guest; for i in $(seq 100); do pidof ferry >/dev/null || break; sleep 0.2; done; true")


def run_steps(checks, pair, name, steps):
    """A failed check ends the guest's journey, as the others have nothing to start from, and counts for them all."""
    for number, (step, *call) in enumerate(steps):
        if not checks.run(f"{name}: {step}", *call):
            end_all(pair.a, pair.b)
            checks.failed += len(steps) - number - 1
            return


def clean(image):
    """The guest's file system is as a power-off leaves it."""
    result = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True)
    if result.returncode != 0:
        raise Failed(f"e2fsck: {result.stdout.strip()}")


def describe(report):
    faults = (report.get("faults") or {}).get("requested", 0)
    return f"{report['total-us'] / 1e6:.2f} s, downtime {report['downtime']['total-us'] / 1e3:.0f} ms, {faults} faults"
