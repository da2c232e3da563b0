"""Two emulated hosts (scripts/lab --pair) that a test drives from outside, and the jobs that run on them."""

import json
import queue
import shlex
import subprocess
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# Takes a command a line; every command's lines come back marked by its number, and "status N" last.
SHELL = "stty -echo; echo ready; while read -r line; do eval \"$line\"; done"


class Failed(Exception):
    """What was not as it should be."""


class Line:
    """A line of a job's output and when it came, in seconds of this machine's clocks."""

    def __init__(self, text):
        self.text = text
        self.monotonic = time.monotonic()
        self.wall = time.time()

    def json(self):
        """The line as a JSON object; an empty one if it is none."""
        try:
            value = json.loads(self.text)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


class Job:
    """A command on a host."""

    def __init__(self, command):
        self.command = command
        self.lines = queue.Queue()
        self.seen = []
        self.status = None

    def next_line(self, deadline):
        """The next line; nothing once the command has ended."""
        if self.status is not None:
            return None
        try:
            line = self.lines.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            raise Failed(f"{self.command}: waited in vain; its last lines: {self.tail()}") from None
        self.seen.append(line)
        word, _, rest = line.text.partition(" ")
        if word == "status" and rest.isdigit():
            self.status = int(rest)
            return None
        return line

    def expect(self, what, seconds):
        """The first line that comes from now on and for which `what` gives something, and what it gives."""
        deadline = time.monotonic() + seconds
        while line := self.next_line(deadline):
            if (found := what(line)):
                return line, found
        raise Failed(f"{self.command}: ended with status {self.status} too early; its last lines: {self.tail()}")

    def drain(self):
        """Takes the lines that have come already."""
        while not self.lines.empty() and self.next_line(time.monotonic() + 1):
            pass

    def wait(self, seconds):
        """All lines, once the command has ended with status 0."""
        deadline = time.monotonic() + seconds
        while self.next_line(deadline):
            pass
        if self.status != 0:
            raise Failed(f"{self.command}: exit status {self.status}; its last lines: {self.tail()}")
        return [line.text for line in self.seen[:-1]]

    def tail(self):
        return " / ".join(line.text for line in self.seen[-4:])


class Host:
    """One of the two hosts; its address in their network is `address`."""

    def __init__(self, pair, name, address):
        self.pair, self.name, self.address = pair, name, address
        self.ready = threading.Event()
        self.jobs = []

    def start(self, command):
        job = Job(f"{self.name}: {command}")
        self.jobs.append(job)
        number = len(self.jobs) - 1
        # Not sed, which holds every line back until the next one has come.
        mark = f"while IFS= read -r line; do echo \"{number}: $line\"; done"
        self.send(f"{{ ( {command} ) </dev/null 2>&1; printf '\\nstatus %s\\n' $?; }} | {mark} &")
        return job

    def run(self, command, seconds=60):
        return self.start(command).wait(seconds)

    def send(self, line):
        self.pair.process.stdin.write(f"{self.name}| {line}\n")
        self.pair.process.stdin.flush()

    def received(self, text):
        if text == "ready":
            self.ready.set()
            return
        number, _, rest = text.partition(": ")
        if number.isdigit() and int(number) < len(self.jobs):
            self.jobs[int(number)].lines.put(Line(rest))
        else:
            # The emulated host's own kernel.
            print(f"{self.name}| {text}", flush=True)


class Pair:
    """Brings the hosts up, with `files` (HOST:GUEST) in them and `disks` as /dev/vda, vdb, ..., and ends them."""

    def __init__(self, files, disks, seconds):
        options = [f"--file={file}" for file in files] + [f"--disk={disk}" for disk in disks]
        shell = shlex.join(["sh", "-c", SHELL])
        self.process = subprocess.Popen(
            [ROOT / "scripts/lab", f"--timeout={seconds}", *options, "--pair", shell, shell],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace")
        self.a, self.b = Host(self, "a", "10.77.0.1"), Host(self, "b", "10.77.0.2")
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        hosts = {"a| ": self.a, "b| ": self.b}
        for line in self.process.stdout:
            if line[:3] in hosts:
                hosts[line[:3]].received(line[3:].rstrip("\r\n"))

    def __enter__(self):
        for host in (self.a, self.b):
            if not host.ready.wait(120):
                self.process.terminate()
                raise Failed(f"the emulated host {host.name} did not come up")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
