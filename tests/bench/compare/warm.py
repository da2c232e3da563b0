"""Memory whose first touch does not count."""

import subprocess
import threading
import time

import host

# A virtual machine's free memory may be given back to its host two seconds after it became free.
HELD = 2.3
# What the rest of the host may need meanwhile.
SPARE = 128 << 20


class Warm:
    """Holds so much memory, touched, so that it is this machine's own when it is free again: its first touch would cost ten times what it
    does elsewhere."""

    def __init__(self, floors, size, beside=0):
        """`beside`: bytes that others are going to use while this is held."""
        command = [floors, "warm", str(max(0, min(size, host.available_memory() - beside - SPARE)))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self._process.stdout.readline()
        except BaseException:
            self.close()
            raise
        self._touched = time.monotonic()

    def release(self):
        threading.Event().wait(self._touched + HELD - time.monotonic())
        self.close()

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
