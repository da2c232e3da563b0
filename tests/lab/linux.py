#!/usr/bin/env python3
"""Linux guests, a stock Debian kernel and a tiny one, on two emulated hosts: they boot, hear the power button, restart,
and move, running, in every mode, and their agent finds nothing wrong with memory, disk and clocks.

One line for each check; exit status 0 if all passed. Guests and Ferry are built first.
"""

import re
import shutil
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

from guest import BOOT, END, MOVE, Checks, Guest, clean, describe, end_all, run_here, run_steps
from hosts import ROOT, Failed, Pair

BLOCK = 64 << 10  # the bitmap's granularity
# Host b's wall clock, which must not become the guest's.
HOUR = 3600


def run_on(checks, host, name, check, *arguments):
    """A check of one guest on one host."""
    if not checks.run(name, check, host, *arguments):
        end_all(host)


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


def restarts_where_it_is(pair, disk):
    """The host to which the guest has moved has its kernel, too, and boots it again; then it moves on."""
    guest = Guest(pair.a, "bzImage-tiny", "initramfs-tiny.cpio.gz", disk, "agent.run=25 end=reboot")
    guest.ticks(2, BOOT)
    guest.move(pair.b, "auto")
    guest.agent("verdict", BOOT)
    guest.agent("start", BOOT)
    guest.seq, guest.clocks = -1, None
    guest.ticks(2, BOOT)
    report = guest.move(pair.a, "postcopy")
    guest.ticks(2, MOVE)
    guest.control("quit")
    guest.job.wait(END)
    return describe(report)


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
    run_steps(checks, pair, name, steps)


def in_parallel(*calls):
    threads = [threading.Thread(target=call, args=arguments) for call, *arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def without_pvh_note(kernel):
    """An ELF kernel whose note of its PVH entry has become one of a type that nobody knows."""
    note = struct.Struct("<III4s")
    known = note.pack(4, 8, 18, b"Xen\0")
    if kernel.count(known) != 1:
        raise Failed("the kernel has no PVH note, or several")
    return kernel.replace(known, note.pack(4, 8, 0x7f, b"Xen\0"))


def main():
    run_here("cargo", "build", "--quiet", "--locked")
    run_here("scripts/guest-linux", "--tiny")
    begin = time.monotonic()
    checks = Checks()
    guests = ROOT / "target/guest/linux"
    names = ["bzImage-debian", "initramfs-debian.cpio.gz", "bzImage-tiny", "vmlinux-tiny", "initramfs-tiny.cpio.gz"]
    files = [f"{ROOT}/target/debug/ferry:/bin/ferry"] + [f"{guests / name}:/g/{name}" for name in names]
    with tempfile.TemporaryDirectory(prefix="lab-test.") as directory:
        plain = Path(directory) / "vmlinux"
        plain.write_bytes(without_pvh_note((guests / "vmlinux-tiny").read_bytes()))
        files.append(f"{plain}:/g/vmlinux-plain")
        images = [Path(directory) / name for name in ("shared", "a", "b")]
        for image in images:
            shutil.copy(guests / "disk.img", image)
        shared, image_a, image_b = images
        with Pair(files, images, seconds=1800) as pair:
            def on_b():
                tiny = "initramfs-tiny.cpio.gz"
                run_on(checks, pair.b, "tiny bzImage restarts", restarts, "/dev/vdc", image_b)
                for kernel, how in [
                        ("bzImage-tiny", "bzImage"), ("vmlinux-tiny", "vmlinux by PVH"),
                        ("vmlinux-plain", "vmlinux by the 64-bit protocol")]:
                    name = f"tiny {how} boots and powers off"
                    run_on(checks, pair.b, name, boots_and_powers_off, kernel, tiny, "/dev/vdc", image_b)

            in_parallel(
                (on_b,),
                (run_on, checks, pair.a, "stock Debian bzImage boots and powers off", boots_and_powers_off,
                 "bzImage-debian", "initramfs-debian.cpio.gz", "/dev/vdb", image_a))
            moves(checks, pair, "stock Debian", shared, "bzImage-debian", "initramfs-debian.cpio.gz")
            run_steps(checks, pair, "tiny", [("restarts where it has moved to, and moves on", restarts_where_it_is, pair, "/dev/vdb")])
            pair.b.run(f"date -s @{time.time() + HOUR:.0f}")
            moves(checks, pair, "tiny, b's clock wrong", shared, "bzImage-tiny", "initramfs-tiny.cpio.gz")
    print(f"lab: {checks.passed} passed, {checks.failed} failed ({time.monotonic() - begin:.0f} s)")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
