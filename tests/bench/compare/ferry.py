"""Ferry, driven over QMP."""

import os

import vmm
from process import Process


class Vmm(vmm.Vmm):
    name = "Ferry"

    def _start(self, name, before, arguments):
        control = os.path.join(self.directory, name)
        command = [*before, self.binary, *arguments, "--serial", "stdio", "--qmp", control]
        return Process(command, control, lambda thread: thread.startswith("vcpu"))

    def run(self, guest, link):
        disk = ["--disk", f"path={guest.disk},id=d"] if guest.disk else []
        size = ["--memory", f"{guest.memory >> 20}M", "--cpus", str(guest.cpus)]
        return self._start("ferry-source", link.source, ["run", "--kernel", self.kernel, "--cmdline", guest.cmdline, *size, *disk])

    def receive(self, guest, link):
        self.port = self.free_port()
        return self._start("ferry-destination", link.destination, ["receive", "--listen", f"tcp:{link.address}:{self.port}"])

    def migrate(self, scenario, source, destination, link):
        parameters = {"downtime_limit": scenario.downtime_ms, "max_bandwidth": scenario.bandwidth, "ferry_mode": scenario.mode}
        parameters["max_postcopy_bandwidth"] = scenario.bandwidth
        if scenario.channels:
            parameters["multifd_channels"] = scenario.channels
        source.qmp.execute("migrate-set-parameters", **parameters)
        for side in (source, destination):
            side.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        return lambda: source.qmp.execute("migrate", uri=f"tcp:{link.address}:{self.port}")

    def said(self, source, destination):
        """The source ends with the migration; its last event has its report."""
        report = source.qmp.migration["report"]
        return {"sent_mb": sum(report["bytes"].values()) / 1e6, "said_downtime_ms": report["downtime"]["total-us"] / 1e3}
