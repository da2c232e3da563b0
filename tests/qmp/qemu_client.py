#!/usr/bin/env python3
"""Drives a control socket with QEMU's own client (qemu.qmp from PyPI) and checks what it sees.

    qemu_client.py SOCKET [--disk ID] [--two-more ID ID] [--migrate-to URI] [--quit]

The guest behind SOCKET must be running and is left running, unless it is to be migrated or ended.
Exits with 0 when all is as in QEMU.
"""

import argparse
import asyncio

from qemu.qmp import ExecuteError, QMPClient

LIMIT = 60


async def expect_error(client, error_class, command, arguments=None, words=None):
    try:
        await client.execute(command, arguments)
    except ExecuteError as error:
        assert error.error_class == error_class, f"{command}: {error.error_class}: {error}"
        assert words is None or str(error) == words, f"{command}: {error}"
    else:
        raise AssertionError(f"{command} {arguments} must fail")


async def event_after(client, command, name):
    """Executes `command` and waits for the event `name`."""
    with client.listener(name) as listener:
        assert await client.execute(command) == {}
        event = await asyncio.wait_for(listener.get(), LIMIT)
        assert set(event["timestamp"]) == {"seconds", "microseconds"}, event
        return event


async def check_queries(client):
    names = {entry["name"] for entry in await client.execute("query-commands")}
    assert {"qmp_capabilities", "stop", "cont", "migrate", "query-migrate", "quit"} <= names, names
    version = await client.execute("query-version")
    assert set(version) == {"qemu", "package"}, version
    assert await client.execute("query-status") == {"status": "running", "running": True}
    await expect_error(client, "CommandNotFound", "no-such-command")
    await expect_error(client, "GenericError", "stop", {"unexpected": 1})
    await expect_error(client, "GenericError", "migrate", {})


async def check_run_state(client):
    await event_after(client, "stop", "STOP")
    assert await client.execute("query-status") == {"status": "paused", "running": False}
    await event_after(client, "cont", "RESUME")
    assert (await client.execute("query-status"))["running"]


async def check_migration_settings(client):
    before = await client.execute("query-migrate-parameters")
    await client.execute("migrate-set-parameters", {"downtime-limit": 123, "max-bandwidth": 1 << 40})
    after = await client.execute("query-migrate-parameters")
    assert after == {**before, "downtime-limit": 123, "max-bandwidth": 1 << 40}, after
    await expect_error(client, "GenericError", "migrate-set-parameters", {"downtime-limit": 3_000_000})
    await client.execute("migrate-set-parameters", before)
    capabilities = await client.execute("query-migrate-capabilities")
    await client.execute("migrate-set-capabilities", {"capabilities": capabilities})
    wanted = {"postcopy-ram", "events", "dirty-bitmaps", "return-path", "postcopy-preempt"}
    assert wanted <= {entry["capability"] for entry in capabilities if entry["state"]}, capabilities
    unknown = [{"capability": "no-such-capability", "state": True}]
    await expect_error(client, "GenericError", "migrate-set-capabilities", {"capabilities": unknown})


async def bitmaps(client, disk):
    (device,) = [device for device in await client.execute("query-block") if device["device"] == disk]
    return {bitmap["name"]: bitmap for bitmap in device["inserted"].get("dirty-bitmaps", [])}


async def check_disk(client, disk):
    await client.execute("block-dirty-bitmap-add", {"node": disk, "name": "check", "granularity": 4096})
    bitmap = (await bitmaps(client, disk))["check"]
    assert bitmap["granularity"] == 4096 and bitmap["recording"] and not bitmap["busy"], bitmap
    await client.execute("block-dirty-bitmap-remove", {"node": disk, "name": "check"})
    assert "check" not in await bitmaps(client, disk)
    absent = {"node": "no-such-disk", "name": "check"}
    words = "Cannot find device='no-such-disk' nor node-name='no-such-disk'"
    await expect_error(client, "GenericError", "block-dirty-bitmap-add", absent, words)
    for command in ("remove", "clear", "enable", "disable"):
        await expect_error(client, "GenericError", "block-dirty-bitmap-" + command, absent, "Node 'no-such-disk' not found")


async def check_bitmaps(client, disk):
    """QEMU's words for what is wrong, and all or nothing. The guest may write meanwhile."""

    async def do(command, name, **more):
        await client.execute("block-dirty-bitmap-" + command, {"node": disk, "name": name, **more})

    async def refused(command, words, **arguments):
        await expect_error(client, "GenericError", command, {"node": disk, **arguments}, words)

    async def sha256(name):
        answer = await client.execute("x-debug-block-dirty-bitmap-sha256", {"node": disk, "name": name})
        assert set(answer) == {"sha256"}, answer
        return answer["sha256"]

    add, merge = "block-dirty-bitmap-add", "block-dirty-bitmap-merge"
    await do("add", "a", persistent=True, disabled=True)
    expected = {"name": "a", "count": 0, "granularity": 65536, "recording": False, "busy": False, "persistent": True}
    assert (await bitmaps(client, disk))["a"] == expected, await bitmaps(client, disk)
    nodes = await client.execute("query-named-block-nodes", {"flat": True})
    (node,) = [node for node in nodes if node["node-name"] == disk]
    assert expected in node["dirty-bitmaps"], node
    await refused(add, "Bitmap already exists: a", name="a")
    await refused(add, "Bitmap name cannot be empty", name="")
    await refused(add, "Bitmap name too long: " + 1024 * "n", name=1024 * "n")
    for granularity in (0, 256, 3000):
        await refused(add, "Granularity must be power of 2 and at least 512", name="b", granularity=granularity)
    for command in ("remove", "clear", "enable", "disable"):
        await refused("block-dirty-bitmap-" + command, "Dirty bitmap 'b' not found", name="b")
    await refused(merge, "Dirty bitmap 'b' not found", target="b", bitmaps=["a"])
    await refused(merge, "Dirty bitmap 'b' not found", target="a", bitmaps=["b"])
    await refused(merge, "Node 'x' not found", target="a", bitmaps=[{"node": "x", "name": "b"}])
    await expect_error(client, "GenericError", merge, {"node": disk, "target": "a", "bitmaps": [1]})
    await do("enable", "a")
    assert (await bitmaps(client, disk))["a"]["recording"]
    await do("disable", "a")
    await do("clear", "a")
    empty = await sha256("a")
    await client.execute(merge, {"node": disk, "target": "a", "bitmaps": ["a", {"node": disk, "name": "a"}]})
    assert await sha256("a") == empty and len(empty) == 64

    def action(kind, **data):
        return {"type": kind, "data": data}

    before = await bitmaps(client, disk)
    actions = [
        action(add, node=disk, name="b", granularity=512, disabled=True),
        action("block-dirty-bitmap-enable", node=disk, name="a"),
        action(merge, node=disk, target="b", bitmaps=["a"]),
        action("block-dirty-bitmap-clear", node=disk, name="a"),
        action("block-dirty-bitmap-disable", node=disk, name="a"),
    ]
    for failing, words in (
        (action("abort"), "Transaction aborted using Abort action"),
        (action(add, node=disk, name="b"), "Bitmap already exists: b"),
        (action("block-dirty-bitmap-remove", node=disk, name="c"), "Dirty bitmap 'c' not found"),
    ):
        arguments = {"actions": [*actions, failing]}
        await expect_error(client, "GenericError", "transaction", arguments, words)
        assert await bitmaps(client, disk) == before
    await expect_error(client, "GenericError", "transaction", {"actions": [action("no-such-action")]})
    await client.execute("transaction", {"actions": actions, "properties": {"completion-mode": "individual"}})
    await client.execute("transaction", {"actions": []})
    assert set(await bitmaps(client, disk)) == {"a", "b"}
    remove = [action("block-dirty-bitmap-remove", node=disk, name=name) for name in "ab"]
    await client.execute("transaction", {"actions": remove})
    devices = await client.execute("query-block")
    assert all("dirty-bitmaps" not in device["inserted"] for device in devices), devices


async def check_two_disks(client, disk, other, small):
    """`other` is as large as `disk`, `small` is not."""
    for node in (disk, other, small):
        await client.execute("block-dirty-bitmap-add", {"node": node, "name": "a"})
    sources = [{"node": other, "name": "a"}]
    await client.execute("block-dirty-bitmap-merge", {"node": disk, "target": "a", "bitmaps": sources})
    sources = [{"node": small, "name": "a"}]
    arguments = {"node": disk, "target": "a", "bitmaps": sources}
    words = "Bitmaps are of different sizes (destination size is 1048576, source size is 65536) and can't be merged"
    await expect_error(client, "GenericError", "block-dirty-bitmap-merge", arguments, words)
    remove = [{"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": "a"}} for node in (other, disk, small)]
    await expect_error(client, "GenericError", "transaction", {"actions": [*remove, {"type": "abort", "data": {}}]})
    assert all([await bitmaps(client, node) for node in (disk, other, small)])
    await client.execute("transaction", {"actions": remove})


async def migrate(client, uri):
    with client.listener(["MIGRATION", "MIGRATION_PASS"]) as listener:
        await client.execute("migrate", {"uri": uri, "detach": True})
        statuses = []
        while not statuses or statuses[-1] not in ("completed", "failed", "cancelled"):
            event = await asyncio.wait_for(listener.get(), LIMIT)
            if event["event"] == "MIGRATION":
                statuses.append(event["data"]["status"])
    assert statuses[-1] == "completed", statuses
    answer = await client.execute("query-migrate")
    assert answer["status"] == "completed", answer
    for key in ("total-time", "downtime", "setup-time", "ram"):
        assert key in answer, answer
    for key in ("transferred", "remaining", "total", "duplicate", "normal", "dirty-sync-count", "page-size"):
        assert key in answer["ram"], answer


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("socket")
    parser.add_argument("--disk", default="d0", help="a disk without a dirty bitmap")
    parser.add_argument("--two-more", nargs=2, metavar="ID", help="a disk of the same size, 1 MiB, and one of 64 KiB")
    parser.add_argument("--migrate-to", metavar="URI")
    parser.add_argument("--quit", action="store_true", help="end the guest")
    arguments = parser.parse_args()

    client, witness = QMPClient("test"), QMPClient("witness")
    await client.connect(arguments.socket)
    await witness.connect(arguments.socket)
    await check_queries(client)
    with witness.listener("STOP") as heard:
        await check_run_state(client)
        await asyncio.wait_for(heard.get(), LIMIT)
    await check_migration_settings(client)
    await check_disk(client, arguments.disk)
    await check_bitmaps(client, arguments.disk)
    if arguments.two_more:
        await check_two_disks(client, arguments.disk, *arguments.two_more)
    await witness.disconnect()
    if arguments.migrate_to:
        await migrate(client, arguments.migrate_to)
    if arguments.quit:
        event = await event_after(client, "quit", "SHUTDOWN")
        assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}, event
    await client.disconnect()
    print("all as in QEMU")


asyncio.run(main())
