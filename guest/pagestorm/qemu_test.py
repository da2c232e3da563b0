#!/usr/bin/env python3
"""Tests pagestorm in QEMU: that it boots on every machine, that what it prints and documents is true when looked
at from outside, that every kind of damage gets its verdict, and that QEMU's own migration passes.

Usage: qemu_test.py KERNEL [ACCELERATOR...]     (default: kvm if there is /dev/kvm, and tcg)
"""

import contextlib
import json
import mmap
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

PAGE = 4096
MASK = (1 << 64) - 1
MULTIPLIER = 0x9E3779B97F4A7C15
PAGE_MAGIC = int.from_bytes(b"PSTMPAGE", "little")
MACHINES = {"microvm": "microvm,x-option-roms=off", "pc": "pc", "q35": "q35"}


def mix(value):
    value = (value ^ value >> 32) * MULTIPLIER & MASK
    value = (value ^ value >> 29) * MULTIPLIER & MASK
    return value ^ value >> 32


def checksum(words):
    lanes = [0] * 4
    for index, word in enumerate(words):
        lane = (lanes[index % 4] ^ (0 if index == 2 else word)) * MULTIPLIER & MASK
        lanes[index % 4] = (lane << 23 | lane >> 41) & MASK
    total = 0
    for lane in lanes:
        total = mix(total ^ lane)
    return total


class Guest:
    """A QEMU with pagestorm in it, its RAM mapped here if `ram` is true."""

    def __init__(self, kernel, accel, cmdline, machine="microvm", cpus=1, disk=None, ram=False, incoming=None):
        self.directory = tempfile.TemporaryDirectory(prefix="pagestorm-")
        qmp, memory = (os.path.join(self.directory.name, name) for name in ("qmp", "ram"))
        size = 128 << 20
        command = ["qemu-system-x86_64", "-accel", accel, "-smp", str(cpus), "-m", "128M", "-nodefaults"]
        command += ["-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", kernel, "-append", cmdline]
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-qmp", f"unix:{qmp},server=on,wait=off"]
        command += ["-global", "virtio-mmio.force-legacy=false"]
        machine = MACHINES[machine]
        if ram:
            machine += ",memory-backend=ram"
            command += ["-object", f"memory-backend-file,id=ram,size={size},mem-path={memory},share=on"]
        command += ["-M", machine]
        if disk:
            command += ["-drive", f"if=none,id=d,file={disk},format=raw,discard=unmap,file.locking=off"]
            command += ["-device", "virtio-blk-device,drive=d"]
        if incoming:
            command += ["-incoming", incoming]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.buffer, self.lines = b"", []
        self.qmp = self.connect(qmp)
        self.execute("qmp_capabilities")
        if ram:
            with open(memory, "r+b") as file:
                self.ram = mmap.mmap(file.fileno(), size)

    def connect(self, path):
        deadline = time.monotonic() + 20
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(path)
                stream = connection.makefile("rw")
                stream.readline()
                return stream
            except OSError:
                connection.close()
                if time.monotonic() > deadline or self.process.poll() is not None:
                    self.process.kill()
                    raise AssertionError("QEMU did not start") from None
                select.select([], [], [], 0.01)

    def execute(self, command, **arguments):
        self.qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.qmp.flush()
        while True:
            reply = json.loads(self.qmp.readline())
            if "return" in reply:
                return reply["return"]
            assert "error" not in reply, reply

    def wait(self, pattern, timeout=30):
        """The first match from here on in what is printed."""
        deadline = time.monotonic() + timeout
        while True:
            while b"\n" in self.buffer:
                line, self.buffer = self.buffer.split(b"\n", 1)
                self.lines.append(line.decode())
                match = re.search(pattern, self.lines[-1])
                if match:
                    return match
            ready = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))[0]
            chunk = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert chunk, f"no {pattern!r} in:\n" + "\n".join(self.lines[-20:])
            self.buffer += chunk

    def passes(self):
        """How many times all pages had been checked when it was stopped."""
        while select.select([self.process.stdout], [], [], 0)[0]:
            self.buffer += os.read(self.process.stdout.fileno(), 65536)
        said = re.findall(r"verdict ok passes=(\d+)", "\n".join(self.lines) + self.buffer.decode())
        return int(said[-1]) if said else 0

    def notices(self, reason, passes):
        """Whether it says that something is wrong before it has checked all pages so many times."""
        while True:
            ok = self.wait(f"verdict bad reason={reason}|verdict ok passes=(\\d+)")[1]
            if ok is None or int(ok) >= passes:
                return ok is None

    def wait_filled(self):
        text = self.wait(r"filled pages=(\d+) first_gpa=(\w+) generations=(\w+) cpu_records=(\w+)")
        self.pages, self.first, self.generations, self.records = (int(value, 0) for value in text.groups())

    def ends(self, status):
        assert self.process.wait(20) == status, (self.process.returncode, self.lines[-5:])

    def generation(self, page):
        return struct.unpack_from("<I", self.ram, self.generations + 4 * page)[0]

    def close(self):
        self.process.kill()
        self.process.wait()
        self.qmp.close()
        self.process.stdout.close()
        self.directory.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def boots(kernel, accel):
    for machine in MACHINES:
        for cpus in (1, 2):
            line = f"run=1 cpus={cpus} fill=8M rate=5000 order=random heartbeat=10"
            with Guest(kernel, accel, line, machine, cpus) as guest:
                guest.wait(f"boot cpus={cpus} cpus_wanted={cpus} ")
                first = int(guest.wait(r"hb seq=5 tsc=(\d+)")[1])
                assert int(guest.wait(r"hb seq=6 tsc=(\d+)")[1]) > first
                assert int(guest.wait(r"stat cpu=%d seq=0 writes=(\d+)" % (cpus - 1))[1]) > 1000
                guest.wait("verdict ok .*final=1")
                guest.ends(33)


def tells_only_at_the_end(kernel, accel):
    line = "run=2 cpus=2 fill=4M rate=5000 stat=off slow=1 heartbeat=10 heartbeat_byte=on"
    with Guest(kernel, accel, line, cpus=2) as guest:
        guest.wait("verdict ok .*final=1")
        told = [said.split()[0] for said in guest.lines if said.startswith(("slow ", "stat ", "verdict "))]
        assert told == ["slow", "slow", "stat", "stat", "verdict"], told
        guest.ends(33)


def refuses(kernel, accel):
    for line, answer in [
        ("fil=1M", "error unknown_key word=fil=1M"),
        ("rate=1 cpus=none", "error bad_value word=cpus=none"),
        ("fill=1G", r"error not_enough_ram most=\d+"),
        ("disk=on", "error disk_not_found"),
    ]:
        with Guest(kernel, accel, line) as guest:
            guest.wait(answer)
            guest.ends(35)


def reads_the_same_outside(kernel, accel):
    for pattern in ("random", "compressible", "zero"):
        line = f"cpus=2 fill=4M rate=max order=hotcold pattern={pattern}"
        with Guest(kernel, accel, line, cpus=2, ram=True) as guest:
            guest.wait_filled()
            guest.wait("stat cpu=1 seq=0 ")
            guest.execute("stop")
            records = [struct.unpack_from("<10Q", guest.ram, guest.records + PAGE * cpu) for cpu in (0, 1)]
            for first, pages, writes, _, _, writing, filled, *_ in records:
                total = sum(guest.generation(page) for page in range(first, first + pages))
                assert total - filled - writes in (0, 1), (total, filled, writes)
                for page in range(first, first + pages):
                    words = struct.unpack_from("<512Q", guest.ram, guest.first + PAGE * page)
                    generation = guest.generation(page)
                    if page == writing:
                        continue
                    if generation == 0:
                        assert pattern == "zero" and not any(words), page
                    else:
                        assert words[:4] == (page, generation, checksum(words), PAGE_MAGIC), page
            assert sum(record[1] for record in records) == guest.pages == 1024


def notices_damage(kernel, accel):
    """Edits RAM from outside while the guest stands still."""

    def at(guest, page):
        return guest.first + PAGE * page

    def flip(guest, _):
        guest.ram[at(guest, 77) + 1000] ^= 4
        return "torn page=77 .*offset=1000"

    def zero(guest, _):
        guest.ram[at(guest, 77) : at(guest, 78)] = bytes(PAGE)
        return "zeroed page=77"

    def swap(guest, _):
        guest.ram[at(guest, 77) : at(guest, 78)] = guest.ram[at(guest, 78) : at(guest, 79)]
        return "number page=77 .*found_number=78"

    def stale(guest, before):
        guest.ram[at(guest, 77) : at(guest, 78)] = before[at(guest, 77) : at(guest, 78)]
        return "stale page=77 .*found_gen=1 "

    def half_stale(guest, before):
        guest.ram[at(guest, 77) + 2048 : at(guest, 78)] = before[at(guest, 77) + 2048 : at(guest, 78)]
        return "torn page=77 .*offset=2048"

    def stale_table(guest, before):
        table = guest.generations
        guest.ram[table : table + PAGE] = before[table : table + PAGE]
        return "ahead page="

    def stale_record(guest, before):
        record = guest.records
        guest.ram[record + 16 : record + 24] = before[record + 16 : record + 24]
        return "generation_sum"

    # rate=200 reaches every one of the 128 pages, and few while this program edits.
    line = "fill=512K rate=200 heartbeat=0"
    for damage in (flip, zero, swap, stale, half_stale, stale_table, stale_record):
        with Guest(kernel, accel, line, ram=True) as guest:
            guest.wait_filled()
            guest.execute("stop")
            before = guest.ram[:]
            guest.execute("cont")
            guest.wait("stat cpu=0 seq=1 ")
            # A page that is written before it is checked is whole again: then it is damaged once more.
            for _ in range(10):
                guest.execute("stop")
                expected, passes = damage(guest, before), guest.passes()
                guest.execute("cont")
                if guest.notices(expected, passes + 3):
                    break
            else:
                raise AssertionError(f"{damage.__name__} was not noticed: {guest.lines[-5:]}")
            guest.ends(35)


def disk_is_kept(kernel, accel):
    with tempfile.NamedTemporaryFile(prefix="pagestorm-") as disk:
        disk.truncate(4 << 20)
        with Guest(kernel, accel, "run=2 fill=1M disk=on disk_rate=1000 disk_discard=on", disk=disk.name) as guest:
            end = guest.wait(r"disk data_blocks=(\d+) zero_blocks=\d+ magic=(\w+) digest=(\w+)")
            guest.wait("verdict ok .*final=1")
            guest.ends(33)
        blocks, magic, digest = (int(value, 0) for value in end.groups())
        found = total = 0
        for number in range(1024):
            words = struct.unpack("<512Q", disk.read(PAGE))
            if words[3] == magic:
                assert words[0] == number and words[2] == checksum(words), number
                found += 1
                total = total + mix(mix(number) ^ words[1]) & MASK
        # A discarded block may still be there, so this counts as a lower bound only where there is one.
        assert found >= blocks > 300, (found, blocks)
        assert found > blocks or total == digest

        with Guest(kernel, accel, "fill=1M disk=on disk_rate=1000", disk=disk.name) as guest:
            guest.wait("stat cpu=0 seq=1 ")
            guest.execute("stop")
            old = open(disk.name, "rb").read()
            guest.execute("cont")
            guest.wait("stat cpu=0 seq=4 ")
            guest.execute("stop")
            with open(disk.name, "r+b") as file:
                file.write(old)
            guest.execute("cont")
            # What was there before: an older generation, nothing, or a block of the first guest's.
            guest.wait("verdict bad reason=disk_(stale|zeroed|magic) block=")
            guest.ends(35)


def migrates(kernel, accel):
    line = "cpus=2 fill=64M rate=20000 order=random disk=on disk_rate=500 heartbeat=10"
    with tempfile.NamedTemporaryFile(prefix="pagestorm-") as disk, contextlib.ExitStack() as guests:
        disk.truncate(16 << 20)
        source = guests.enter_context(Guest(kernel, accel, line, cpus=2, disk=disk.name))
        source.wait("verdict ok")
        for move in range(4):
            path = os.path.join(source.directory.name, "move")
            target = Guest(kernel, accel, line, cpus=2, disk=disk.name, incoming=f"unix:{path}")
            guests.enter_context(target)
            postcopy = move % 2 == 1
            for guest in (source, target):
                capability = {"capability": "postcopy-ram", "state": postcopy}
                guest.execute("migrate-set-capabilities", capabilities=[capability])
            source.execute("migrate", uri=f"unix:{path}")
            if postcopy:
                source.execute("migrate-start-postcopy")
            passes = int(target.wait(r"verdict ok passes=(\d+)")[1])
            now = passes
            while now < passes + 2:
                verdict = target.wait(r"verdict (ok passes=(\d+)|bad.*)")
                assert verdict[2], verdict[1]
                now = int(verdict[2])
            status = source.execute("query-migrate")["status"]
            assert status == "completed", status
            source.close()
            source = target


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    # So that a guest under test does not outlive the test.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    kernel = sys.argv[1]
    accelerators = sys.argv[2:] or [*(["kvm"] if os.path.exists("/dev/kvm") else []), "tcg"]
    for accel in accelerators:
        for test in (boots, tells_only_at_the_end, refuses, reads_the_same_outside, notices_damage, disk_is_kept, migrates):
            start = time.monotonic()
            test(kernel, accel)
            print(f"{accel} {test.__name__}: ok in {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
