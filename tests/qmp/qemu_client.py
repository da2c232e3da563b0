#!/usr/bin/env python3
"""Drives a control socket with QEMU's own client (qemu.qmp from PyPI) and checks what it sees.

    qemu_client.py SOCKET [--disk ID] [--migrate-to URI] [--quit]

The guest behind SOCKET must be running and is left running, unless it is to be migrated or ended.
Exits with 0 when all is as in QEMU.
"""

import argparse
import asyncio

from qemu.qmp import ExecuteError, QMPClient

LIMIT = 60


async def expect_error(client, error_class, command, arguments=None):
    try:
        await client.execute(command, arguments)
    except ExecuteError as error:
        assert error.error_class == error_class, f"{command}: {error.error_class}: {error}"
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
    await expect_error(client, "DeviceNotFound", "block-dirty-bitmap-add", absent)


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
    await witness.disconnect()
    if arguments.migrate_to:
        await migrate(client, arguments.migrate_to)
    if arguments.quit:
        event = await event_after(client, "quit", "SHUTDOWN")
        assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}, event
    await client.disconnect()
    print("all as in QEMU")


asyncio.run(main())
