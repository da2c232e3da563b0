"""What the guest says on its serial port, with the time at which it came."""

import os
import re
import threading
import time

# A heartbeat is a byte of this and the number of pages written since the last one (guest/pagestorm); text has none.
HEARTBEAT = 128


class Console:
    """Reads one end of a pipe until it ends. Heartbeats are single bytes a millisecond apart; all else are lines."""

    def __init__(self, descriptor):
        self.beats = []
        self.lines = []
        self.first_byte = None
        self._text = b""
        self._changed = threading.Condition()
        self._ended = False
        threading.Thread(target=self._read, args=(descriptor,), daemon=True).start()

    def _read(self, descriptor):
        while chunk := os.read(descriptor, 65536):
            now = time.monotonic()
            with self._changed:
                self.first_byte = self.first_byte or now
                self.beats += [(now, byte - HEARTBEAT) for byte in chunk if byte >= HEARTBEAT]
                text = bytes(byte for byte in chunk if byte < HEARTBEAT)
                *lines, self._text = (self._text + text).split(b"\n")
                self.lines += [(now, line.decode()) for line in lines]
                if lines:
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        os.close(descriptor)

    def wait(self, pattern, timeout=60, after=0):
        """The first line from number `after` on that matches; returns the match and the number of the line after it."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for number in range(after, len(self.lines)):
                    if match := re.search(pattern, self.lines[number][1]):
                        return match, number + 1
                after = len(self.lines)
                left = deadline - time.monotonic()
                if left <= 0 or self._ended:
                    said = "\n".join(line for _, line in self.lines[-5:])
                    raise RuntimeError(f"the guest does not say {pattern!r}; its last words:\n{said}")
                self._changed.wait(left)

    def now(self):
        """The number of lines so far."""
        with self._changed:
            return len(self.lines)


def pipe():
    """A console, and the descriptor that a process is to write to."""
    read, write = os.pipe()
    return Console(read), write
