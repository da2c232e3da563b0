"""Ferry, driven over QMP."""

import os

from process import Process

NAME = "Ferry"


class Vmm:
    name = NAME

    def __init__(self, binary, kernel, directory, port):
        self.binary, self.kernel, self.directory, self.port = binary, kernel, directory, port

    def _start(self, name, arguments):
        control = os.path.join(self.directory, name)
        command = [self.binary, *arguments, "--serial", "stdio", "--qmp", control]
        return Process(command, control, lambda thread: thread.startswith("vcpu"))

    def run(self, guest):
        disk = ["--disk", f"path={guest.disk},id=d"] if guest.disk else []
        size = ["--memory", f"{guest.memory >> 20}M", "--cpus", str(guest.cpus)]
        return self._start("ferry-source", ["run", "--kernel", self.kernel, "--cmdline", guest.cmdline, *size, *disk])

    def receive(self, guest, address="127.0.0.1"):
        return self._start("ferry-destination", ["receive", "--listen", f"tcp:{address}:{self.port}"])

    def migrate(self, scenario, source, destination, address="127.0.0.1"):
        parameters = {"downtime_limit": scenario.downtime_ms, "max_bandwidth": scenario.bandwidth, "ferry_mode": scenario.mode}
        parameters["max_postcopy_bandwidth"] = scenario.bandwidth
        if scenario.channels:
            parameters["multifd_channels"] = scenario.channels
        source.qmp.execute("migrate-set-parameters", **parameters)
        capabilities = [{"capability": name, "state": True} for name in ("events",)]
        for side in (source, destination):
            side.qmp.execute("migrate-set-capabilities", capabilities=capabilities)
        return lambda: source.qmp.execute("migrate", uri=f"tcp:{address}:{self.port}")

    def said(self, source, destination):
        """What the monitor itself reports of the migration."""
        return {}
