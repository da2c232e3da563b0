"""As much of QMP as this needs."""

import json
import select
import socket
import time


class Qmp:
    def __init__(self, path, process, timeout=20):
        deadline = time.monotonic() + timeout
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(path)
                break
            except OSError:
                self._socket.close()
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError(f"nobody listens on {path}") from None
                select.select([], [], [], 0.002)
        self._buffer = b""
        self._events = []
        # The data of the last MIGRATION event.
        self.migration = {}
        self._receive(timeout)
        self.execute("qmp_capabilities")

    def _receive(self, timeout):
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = self._socket.recv(65536)
            if not chunk:
                raise ConnectionError("the monitor was closed")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def execute(self, command, **arguments):
        request = {"execute": command, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = self._receive(60)
            if "event" in answer:
                self._events.append((time.monotonic(), answer))
            elif "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def wait_migrated(self, timeout):
        """When the migration had completed, by its event."""
        deadline = time.monotonic() + timeout
        while True:
            while self._events:
                at, event = self._events.pop(0)
                if event["event"] != "MIGRATION":
                    continue
                self.migration = event["data"]
                status = self.migration["status"]
                if status == "completed":
                    return at
                if status in ("failed", "cancelled", "postcopy-paused"):
                    raise RuntimeError(f"the migration is {status}: {self.execute('query-migrate')}")
            answer = self._receive(deadline - time.monotonic())
            self._events.append((time.monotonic(), answer))
