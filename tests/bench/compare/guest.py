"""What pagestorm, the guest, tells of a migration on its console."""

import re

VERDICT = r"verdict bad .*|verdict ok .*final=1"


class Damage(Exception):
    """The guest found that its memory or its disk is not what it wrote."""


class Unfinished(Exception):
    """The guest's run was over, or nobody would wait any longer, before it had moved."""


def check_verdict(console, timeout=60):
    """Waits until the guest has checked all that it ever wrote."""
    refuse_damage(console.wait(VERDICT, timeout)[0][0])


def refuse_damage(text):
    if bad := re.search(r"verdict bad .*", text):
        raise Damage(bad[0])


def heartbeats(source, destination, began, ended, rate):
    """The blackout between the last heartbeat there and the first one here; the longest time without one while the migration went on,
    which may have been a stall elsewhere; and what part of its writes the guest got done."""
    if not destination.beats:
        # All that it did here was its last check.
        raise Unfinished(f"{ended - began:.1f} s")
    result = {"blackout_ms": (destination.beats[0][0] - source.beats[-1][0]) * 1e3}
    beats = source.beats + destination.beats
    holes = [later - earlier for (earlier, _), (later, _) in zip(beats, beats[1:]) if later >= began and earlier <= ended]
    result["largest_hole_ms"] = max(holes) * 1e3
    if rate:
        during = sum(writes for at, writes in beats if began <= at <= ended)
        result["progress"] = during / (ended - began) / rate
    return result


def slow_accesses(console):
    """How long the guest's writes took that were slow, over its whole run. Before the migration it runs alone and has few of them, so
    these are the migration's."""
    counts = {}
    for _, line in console.lines:
        if match := re.match(r"slow cpu=\d+ us=(.*)", line):
            for pair in filter(None, match[1].split(",")):
                us, count = map(int, pair.split(":"))
                counts[us] = counts.get(us, 0) + count
    total = sum(counts.values())
    if not total:
        return {"slow_count": 0}
    result, seen, wanted = {"slow_count": total}, 0, {"slow_p50_ms": 0.5, "slow_p99_ms": 0.99, "slow_max_ms": 1.0}
    for us in sorted(counts):
        seen += counts[us]
        for name in [name for name, part in wanted.items() if seen >= part * total]:
            result[name] = us / 1e3
            del wanted[name]
    return result
