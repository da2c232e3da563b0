"""QEMU's microvm, driven over QMP."""

import os

from process import Process

NAME = "QEMU"
# Its default limit is 128 MiB/s; this is none.
UNLIMITED = 100_000_000_000


class Vmm:
    name = NAME

    def __init__(self, binary, kernel, directory, port):
        self.binary, self.kernel, self.directory, self.port = binary, kernel, directory, port

    def _start(self, name, guest, arguments):
        control = os.path.join(self.directory, name)
        command = [self.binary, "-accel", "kvm", "-M", "microvm,x-option-roms=off", "-smp", str(guest.cpus)]
        command += ["-m", f"{guest.memory >> 20}M", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]
        command += ["-kernel", self.kernel, "-append", guest.cmdline, "-name", "guest,debug-threads=on"]
        command += ["-qmp", f"unix:{control},server=on,wait=off", "-global", "virtio-mmio.force-legacy=false"]
        if guest.disk:
            command += ["-drive", f"if=none,id=d,file={guest.disk},format=raw,file.locking=off"]
            command += ["-device", "virtio-blk-device,drive=d"]
        return Process(command + arguments, control, lambda thread: thread.startswith("CPU "))

    def run(self, guest):
        return self._start("qemu-source", guest, [])

    def receive(self, guest, address="127.0.0.1"):
        return self._start("qemu-destination", guest, ["-incoming", "defer"])

    def migrate(self, scenario, source, destination, address="127.0.0.1"):
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
        destination.qmp.execute("migrate-incoming", uri=f"tcp:{address}:{self.port}")

        def begin():
            source.qmp.execute("migrate", uri=f"tcp:{address}:{self.port}")
            if scenario.mode == "postcopy":
                source.qmp.execute("migrate-start-postcopy")

        return begin

    def said(self, source, destination):
        return {}
