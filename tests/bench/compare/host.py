"""The host that all this is measured on: what it is, and whether it was there all the time."""

import os
import platform
import shutil
import subprocess
import tempfile
import time

# The column of /proc/stat with the time that this machine's own host gave to others, after the line's name.
STEAL_COLUMN = 7


def available_memory():
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemAvailable"))


def _stolen():
    with open("/proc/stat") as stat:
        return int(stat.readline().split()[1:][STEAL_COLUMN]) / os.sysconf("SC_CLK_TCK")


class Steal:
    """What part of its processors' time this machine did not get from its host, since this object was made. It is counted in ticks of
    10 ms, so over a short time it is coarse."""

    def __init__(self):
        self._began, self._stolen = time.monotonic(), _stolen()

    def part(self):
        return (_stolen() - self._stolen) / (time.monotonic() - self._began) / os.cpu_count()


def describe():
    with open("/proc/cpuinfo") as cpuinfo:
        model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    with open("/proc/meminfo") as meminfo:
        memory = int(meminfo.readline().split()[1]) << 10
    with open("/proc/sys/net/ipv4/tcp_congestion_control") as control:
        congestion = control.read().strip()
    return {"processor": model, "processors": os.cpu_count(), "memory": memory, "kernel": platform.release(), "tcp": congestion}


def size_of(binary):
    """Bytes of a program's file, without symbols and debugging information where this host can strip them, and of the libraries that it
    loads. Firmware and modules that it opens later are not in it."""
    binary = shutil.which(binary)
    result = {"file": os.path.getsize(binary)}
    if shutil.which("strip"):
        with tempfile.NamedTemporaryFile(prefix="ferry-bench-") as file:
            if subprocess.run(["strip", "-o", file.name, binary], capture_output=True).returncode == 0:
                result["stripped"] = os.path.getsize(file.name)
    loaded = subprocess.run(["ldd", binary], capture_output=True, text=True).stdout
    libraries = {word for word in loaded.split() if word.startswith("/")}
    return result | {"libraries": sum(map(os.path.getsize, libraries)), "library_count": len(libraries)}


def version_of(binary):
    text = subprocess.run([binary, "--version"], capture_output=True, text=True).stdout
    return text.splitlines()[0] if text else "unknown"
