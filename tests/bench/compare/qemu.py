"""QEMU's microvm, driven over QMP."""

import os

import vmm
from process import Process

# Its default limit is 128 MiB/s; this is none.
UNLIMITED = 100_000_000_000


class Vmm(vmm.Vmm):
    name = "QEMU"

    def _start(self, name, before, guest, arguments):
        control = os.path.join(self.directory, name)
        command = [*before, self.binary, "-accel", "kvm", "-M", "microvm,x-option-roms=off", "-smp", str(guest.cpus)]
        command += ["-m", f"{guest.memory >> 20}M", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]
        command += ["-kernel", self.kernel, "-append", guest.cmdline, "-name", "guest,debug-threads=on"]
        command += ["-qmp", f"unix:{control},server=on,wait=off", "-global", "virtio-mmio.force-legacy=false"]
        if guest.disk:
            command += ["-drive", f"if=none,id=d,file={guest.disk},format=raw,file.locking=off"]
            command += ["-device", "virtio-blk-device,drive=d"]
        return Process(command + arguments, control, lambda thread: thread.startswith("CPU "))

    def run(self, guest, link):
        return self._start("qemu-source", link.source, guest, [])

    def receive(self, guest, link):
        self.port = self.free_port()
        return self._start("qemu-destination", link.destination, guest, ["-incoming", "defer"])

    def migrate(self, scenario, source, destination, link):
        postcopy = scenario.mode != "precopy"
        names = {"events": True, "postcopy-ram": postcopy, "postcopy-preempt": postcopy, "multifd": scenario.channels > 1}
        capabilities = [{"capability": name, "state": state} for name, state in names.items()]
        parameters = {"downtime_limit": scenario.downtime_ms, "max_bandwidth": scenario.bandwidth or UNLIMITED}
        parameters["max_postcopy_bandwidth"] = scenario.bandwidth
        if scenario.channels > 1:
            parameters["multifd_channels"] = scenario.channels
        for side in (source, destination):
            side.qmp.execute("migrate-set-capabilities", capabilities=capabilities)
            side.qmp.execute("migrate-set-parameters", **parameters)
        uri = f"tcp:{link.address}:{self.port}"
        destination.qmp.execute("migrate-incoming", uri=uri)

        def begin():
            source.qmp.execute("migrate", uri=uri)
            if scenario.mode == "postcopy":
                source.qmp.execute("migrate-start-postcopy")

        return begin

    def said(self, source, destination):
        """The source stays, and can be asked. Its downtime is in whole milliseconds, and ends when the source has sent all."""
        status = source.qmp.execute("query-migrate")
        return {"sent_mb": status["ram"]["transferred"] / 1e6, "said_downtime_ms": status["downtime"]}
