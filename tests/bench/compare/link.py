"""What is between source and destination: loopback, or two network namespaces with a line of a given round trip and rate between them."""

import os
import subprocess

# As of many links within a data centre.
MTU = 9000


class Loopback:
    """Both sides in this network namespace."""

    address = "127.0.0.1"
    source = destination = ()

    def close(self):
        pass


class Link:
    """Two namespaces, joined by the relay (tests/bench/relay.rs). For root alone."""

    address = "10.77.0.2"
    _source_address = "10.77.0.1"

    def __init__(self, relay, round_trip_ms, bytes_per_second):
        self._names = [f"ferry-bench-{os.getpid()}-{side}" for side in "ab"]
        self._made = []
        self._relay = None
        self.source, self.destination = (("ip", "netns", "exec", name) for name in self._names)
        try:
            for name in self._names:
                # Before it is there: an interruption may come between.
                self._made.append(name)
                self._ip("netns", "add", name)
            arguments = [*self.paths, str(round(round_trip_ms * 1000)), str(bytes_per_second)]
            self._relay = subprocess.Popen([relay, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if self._relay.stdout.readline() != b"ready\n":
                raise RuntimeError("the relay does not start")
            for name, address in zip(self._names, (self._source_address, self.address)):
                self._ip("-n", name, "address", "add", f"{address}/24", "dev", "link0")
                self._ip("-n", name, "link", "set", "link0", "mtu", str(MTU), "up")
                self._ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    @property
    def paths(self):
        """Source's and destination's namespace, as setns(2) takes them."""
        return [f"/run/netns/{name}" for name in self._names]

    @staticmethod
    def _ip(*arguments):
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    def close(self):
        if self._relay:
            self._relay.stdin.close()
            self._relay.wait()
            self._relay.stdout.close()
        for name in self._made:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def impossible():
    """Why there can be no such link here; None if there can."""
    if os.geteuid() != 0:
        return "a link with a round trip needs root, for network namespaces"
    if not os.path.exists("/dev/net/tun"):
        return "a link with a round trip needs /dev/net/tun"
    return None
