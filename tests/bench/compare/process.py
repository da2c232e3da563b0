"""A virtual machine monitor as a process: its console, its monitor, what it has used."""

import os
import re
import subprocess
import time

import console
import qmp

SCHEDULER_CLOCK = 2
THREAD = 4


def clock_of(identifier, kind=0):
    """Processor seconds of a process with all its threads, or of a thread (clock_getcpuclockid(3), as the kernel makes its clocks)."""
    return time.clock_gettime((~identifier << 3) | SCHEDULER_CLOCK | kind)


def memory_of(process):
    """Bytes that are resident beside the guest's RAM, with those of the program and its libraries. The RAM is the largest range of
    anonymous memory; advice may have split it into mappings that follow one another."""
    ranges, last_end = [], None
    with open(f"/proc/{process}/smaps") as smaps:
        for line in smaps:
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) rw-\S+ \S+ \S+ \d+\s*$", line):
                start, end = (int(text, 16) for text in match.groups())
                if start != last_end:
                    ranges.append([0, 0])
                ranges[-1][0] += end - start
                last_end = end
            elif re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                ranges.append([0, 0])
                last_end = None
            elif line.startswith("Rss:"):
                ranges[-1][1] += int(line.split()[1]) << 10
    return sum(resident for _, resident in ranges) - max(ranges)[1]


class Process:
    def __init__(self, command, control, is_vcpu):
        self.console, output = console.pipe()
        self.errors = open(control + ".log", "w+")
        self.began = time.monotonic()
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=self.errors)
        os.close(output)
        self.pid = self._process.pid
        self._is_vcpu = is_vcpu
        self._vcpus = {}
        self._ended = None
        try:
            self.qmp = qmp.Qmp(control, self)
        except (OSError, RuntimeError) as error:
            said = self.said()
            self.close()
            raise RuntimeError(f"{' '.join(command)} does not start: {error}\n{said}") from error
        except BaseException:
            self.close()
            raise

    def poll(self):
        return self._process.poll()

    def cpu(self):
        """Processor seconds so far, without those of the vCPUs' threads; also after the process has ended."""
        self.look_at_vcpus()
        try:
            total = clock_of(self.pid)
        except OSError:
            total = 0.0
        if total == 0.0 or self._ended:
            if not self._ended:
                _, status, self._ended = os.wait4(self.pid, 0)
                self._process.returncode = os.waitstatus_to_exitcode(status)
            total = self._ended.ru_utime + self._ended.ru_stime
        return total - sum(self._vcpus.values())

    def look_at_vcpus(self):
        """Remembers what the vCPUs' threads have used: they may be gone when the sum is made."""
        try:
            for thread in os.listdir(f"/proc/{self.pid}/task"):
                if thread not in self._vcpus:
                    with open(f"/proc/{self.pid}/task/{thread}/comm") as comm:
                        if not self._is_vcpu(comm.read()):
                            continue
                self._vcpus[thread] = clock_of(int(thread), THREAD)
        except OSError:
            pass

    def said(self):
        """What it has written to its standard error."""
        self.errors.seek(0)
        return self.errors.read()

    def memory(self):
        return memory_of(self.pid)

    def close(self):
        if self._ended is None:
            self._process.kill()
            self._process.wait()
        self.errors.close()
