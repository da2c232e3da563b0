"""What an adapter to a virtual machine monitor has to offer. Ferry's and QEMU's are such; another monitor is one more module like them, and
an entry in `__main__.py`."""

import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Guest:
    """What a monitor needs to know to run the guest; its kernel is the same for all."""

    memory: int
    cpus: int
    cmdline: str
    disk: str | None = None


class Vmm:
    """Starts a monitor's processes and has them migrate; measuring is not its business.

    - `name`: as tables call it, `binary`: its program, `kernel`: pagestorm, `directory`: for sockets and the like.
    - `run(guest, link)`: a `Process` in which the guest boots, with its first serial port on standard output. It runs with the words of
      `link.source` in front of its command.
    - `receive(guest, link)`: a `Process` that waits for the guest, behind the words of `link.destination`.
    - `migrate(scenario, source, destination, link)`: sets both sides up, so that all that is left is to begin, and returns the function
      that begins. Between its call and the completion on both sides is the migration's total time.
    - `said(source, destination)`: after the migration, what the monitor itself tells of it: `sent_mb`, bytes on the wire in millions,
      and `said_downtime_ms`; what it does not tell is left out.

    A `Process` needs to know which of its threads run vCPUs (by their names), because their time is the guest's, not the monitor's; and
    its control socket is one for QMP: a monitor that speaks something else brings its own class with `execute` and `wait_migrated`.
    """

    name = None

    def __init__(self, binary, kernel, directory):
        self.binary, self.kernel, self.directory = binary, kernel, directory
        # The destination's, chosen anew for each.
        self.port = None

    @staticmethod
    def free_port():
        """One that nobody listens on now."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return listener.getsockname()[1]

    def run(self, guest, link):
        raise NotImplementedError

    def receive(self, guest, link):
        raise NotImplementedError

    def migrate(self, scenario, source, destination, link):
        raise NotImplementedError

    def said(self, source, destination):
        return {}
