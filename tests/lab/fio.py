#!/usr/bin/env python3
"""fio in a Linux guest, a stock Debian kernel, that moves between two emulated hosts: it writes at random past the page cache, to a disk and
to a file of an ext4, and verifies what it has written, while a move's destination is killed before the commit and a move's link
is cut after it. After each of these fio must have verified anew what it wrote before and what it wrote since.

One line for each check; exit status 0 if all passed. Guests and Ferry are built first.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from guest import BOOT, END, MOVE, Checks, Guest, clean, describe, run_here, run_steps
from hosts import ROOT, Failed, Pair

PASS_KIB = 2 * 2 << 10  # what each pass of guest/linux/fio-rounds verifies


def reaches(status):
    """What a line of `ferry migrate` says when the migration's status is this one."""
    return lambda line: line.json().get("data", {}).get("status") == status


def fails(job):
    """The migration that this job waits for comes to no good end; gives what it says."""
    try:
        job.wait(MOVE)
    except Failed:
        if job.status == 1:
            return job.tail()
        raise
    raise Failed(f"{job.command}: succeeded, although it was in trouble")


class Fio:
    """A guest with fio in it."""

    def __init__(self, pair, image):
        self.pair, self.image = pair, image
        self.guest = Guest(pair.a, "bzImage-debian", "initramfs-fio.cpio.gz", "/dev/vda", "fio agent.disk=off", "--disk path=/dev/vdb,id=e")
        self.verified = 0

    def there(self):
        return self.pair.b if self.guest.host is self.pair.a else self.pair.a

    def next_pass(self, kind=None):
        """The next pass that fio ends, of this kind."""
        while True:
            _, fields = self.guest.agent("fio", MOVE)
            if fields["verified_kib"] != PASS_KIB:
                raise Failed(f"fio has verified too little: {fields}")
            self.verified += PASS_KIB
            if kind in (None, fields["pass"]):
                return fields["round"]

    def rounds(self):
        """The pass that fio is in ends well, and so does a whole round after it: one half is written and verified, then the other verified."""
        before = self.verified
        self.next_pass()
        written = self.next_pass("write")
        if self.next_pass("again") != written - 1:
            raise Failed(f"round {written} did not verify what the one before it had written")
        return f"fio has verified {(self.verified - before) >> 10} MiB"

    def boot(self):
        self.guest.ticks(3, BOOT)
        return self.rounds()

    def move(self, mode):
        report = self.guest.move(self.there(), mode)
        self.guest.ticks(3, MOVE)
        return f"{describe(report)}, {self.rounds()}"

    def killed_before_commit(self):
        there = self.there()
        receiver = self.guest.receiver(there)
        migration = self.guest.host.start(self.guest.migration("migrate", there, "--mode precopy --max-bandwidth 4M"))
        migration.expect(reaches("active"), MOVE)
        there.run("kill -9 $(pidof ferry)")
        fails(migration)
        fails_killed(receiver)
        self.guest.job.drain()
        self.guest.ticks(3, MOVE)
        return self.rounds()

    def cut_after_commit(self):
        source, there = self.guest.host, self.there()
        receiver = self.guest.receiver(there)
        migration = source.start(self.guest.migration("migrate", there, "--mode postcopy --postcopy-bandwidth 4M"))
        migration.expect(reaches("postcopy-active"), MOVE)
        there.run("ip link set eth0 down")
        said = fails(migration)
        if "ferry recover" not in said:
            raise Failed(f"the source does not say how to go on: {said}")
        there.run("ip link set eth0 up")
        source.run(self.guest.migration("recover", there, "--report /tmp/report"), MOVE)
        report = self.guest.moved(there, receiver)
        if report["recoveries"] != 1:
            raise Failed(f"one recovery, but the report says {report['recoveries']}")
        self.guest.ticks(3, MOVE)
        return f"{describe(report)}, {self.rounds()}"

    def end(self):
        """fio ends its round, and verifies everything a last time with nothing in the page cache."""
        self.guest.control("powerdown")
        self.guest.agent("verdict", END)
        last = [self.next_pass("last") for _ in range(2)]
        if last[1] != last[0] + 1:
            raise Failed(f"the last passes were over rounds {last}")
        self.guest.job.wait(END)
        clean(self.image)
        return f"fio has verified {self.verified >> 10} MiB in all"


def fails_killed(job):
    try:
        job.wait(MOVE)
    except Failed:
        pass
    if job.status != 128 + 9:
        raise Failed(f"{job.command}: exit status {job.status}, not killed")


def main():
    run_here("cargo", "build", "--quiet", "--locked")
    run_here("scripts/guest-linux", "--fio")
    begin = time.monotonic()
    checks = Checks()
    guests = ROOT / "target/guest/linux"
    files = [f"{ROOT}/target/debug/ferry:/bin/ferry"] + [
        f"{guests / name}:/g/{name}" for name in ("bzImage-debian", "initramfs-fio.cpio.gz")]
    with tempfile.TemporaryDirectory(prefix="lab-fio.") as directory:
        ext4, raw = Path(directory) / "ext4", Path(directory) / "raw"
        shutil.copy(guests / "disk.img", ext4)
        raw.touch()
        with open(raw, "r+b") as file:
            file.truncate(64 << 20)
        with Pair(files, [ext4, raw], seconds=1200) as pair:
            guest = Fio(pair, ext4)
            run_steps(checks, pair, "fio", [
                ("boots at a", guest.boot),
                ("a to b, auto", guest.move, "auto"),
                ("b to a, postcopy", guest.move, "postcopy"),
                ("stays at a, the destination killed before the commit", guest.killed_before_commit),
                ("a to b, another try", guest.move, "auto"),
                ("b to a, the link cut after the commit", guest.cut_after_commit),
                ("powers off, all well", guest.end),
            ])
    print(f"fio: {checks.passed} passed, {checks.failed} failed ({time.monotonic() - begin:.0f} s)")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
