"""The results as text."""

from metrics import METRICS
from rounds import DISTURBED, describe

WIDTH = 26
TITLE = 27


def number(value, unit=""):
    """Three digits that count, but whole numbers whole."""
    if unit == "%":
        return f"{value * 100:.1f}"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    digits = 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f}" if abs(value) >= 0.1 else f"{value:.2g}"


def cell(spread, unit):
    median, least, most = (number(spread[key], unit) for key in ("median", "min", "max"))
    return f"{median:>8}" if least == most else f"{median:>8} ({least}-{most})"


def ratio(first, second):
    return f"{first['median'] / second['median']:>9.2f}" if first and second and second["median"] else f"{'':9}"


def scenario_lines(result):
    yield f"{result['name']}: {result['title']}"
    if result["skipped"]:
        yield f"  NOT RUN: {result['skipped']}"
        return
    names = list(result["runs"])
    summary = result["summary"]
    floor = summary["floor"].get("total_ms")
    between = f"{'/'.join(names):>12}" if len(names) == 2 else ""
    floors = "".join(f"{name + '/floor':>13}" for name in names) if floor else ""
    yield f"  {'':{TITLE}}" + "".join(f"{name:<{WIDTH}}" for name in names) + between + floors
    if floor:
        yield f"  {'floor, ms':{TITLE}}{cell(floor, 'ms')}"
    for metric in METRICS:
        if least := summary["least"].get(metric.key):
            yield f"  {'least ' + metric.label:{TITLE}}{cell(least, metric.unit)}"
    for metric in METRICS:
        spreads = [summary[name].get(metric.key) for name in names]
        if any(spreads):
            yield _row(metric, spreads, floor).rstrip()
    for name, runs in result["runs"].items():
        if disturbed := sum(run.get("disturbed", False) for run in runs):
            yield f"  {name}: {disturbed} of {len(runs)} runs had over {DISTURBED:.0%} steal"
        for run in runs:
            if {"damage", "failed", "unfinished"} & run.keys():
                yield f"  {name}: {describe(run)}"


def _row(metric, spreads, floor):
    row = f"  {metric.label:{TITLE}}" + "".join(f"{cell(spread, metric.unit) if spread else '       -':<{WIDTH}}" for spread in spreads)
    if len(spreads) == 2:
        row += f"{ratio(*spreads) if metric.ratio else '':>12}"
    if metric.key == "total_ms" and floor:
        row += "".join(f"{ratio(spread, floor):>13}" for spread in spreads)
    return row


def render(results):
    lines = []
    for result in results["scenarios"]:
        lines += [*scenario_lines(result), ""]
    lines += ["Each value is the median of all rounds (least-most). Floor: as many bytes as the guest filled, from memory to memory over",
              "one TCP connection, on loopback (the best of three) or the scenario's link, in the same rounds. Least: a postcopy by the",
              "smallest program, userfaultfd and two connections, with a thread in the place of the guest.", ""]
    shown = {key for result in results["scenarios"] for name in result["runs"] for key in result.get("summary", {}).get(name, {})}
    lines += [f"  {metric.title:20} {metric.meaning}" for metric in METRICS if metric.key in shown and metric.meaning]
    lines += ["", *map(size_line, results["vmms"].items())]
    lines += ["Debian strips its programs, cargo does not. What firmware QEMU reads is not counted."]
    host = results["host"]
    lines += [f"Host: {host['processors']} x {host['processor']}, {host['memory'] / 1e9:.0f} GB, Linux {host['kernel']}, TCP {host['tcp']}"]
    return "\n".join(lines)


def size_line(item):
    name, vmm = item
    size = vmm["size"]
    stripped = f", {size['stripped'] / 1e6:.1f} MB stripped" if "stripped" in size else ""
    libraries = f"{size['libraries'] / 1e6:.1f} MB in {size['library_count']} libraries"
    return f"{name}: {vmm['version']}; program {size['file'] / 1e6:.1f} MB{stripped}, and {libraries}"
