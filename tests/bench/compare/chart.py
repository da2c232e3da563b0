"""The results as one picture (SVG): for each scenario the totals and the blackouts of both monitors, on logarithmic scales."""

import math
import re
import textwrap
from xml.sax.saxutils import escape

from rounds import DISTURBED, describe

WIDTH, MARGIN, LABELS, GAP = 1080, 24, 262, 44
PANEL = (WIDTH - 2 * MARGIN - LABELS - GAP) / 2
HEAD, ROW, FOOT = 124, 50, 44
# A label to the right of its whisker takes about so much.
LABEL = 54
PANELS = [("total_ms", "total time"), ("blackout_ms", "blackout")]

# Contrast is kept on light and on dark ground; which one is the reader's choice. No variables: not every program that shows SVG has them.
LIGHT = {"ground": "#ffffff", "ink": "#1f2328", "muted": "#59636e", "grid": "#dde1e6", "band": "#f6f8fa", "floor": "#57606a"}
LIGHT |= {"v0": "#c2410c", "v1": "#1d6fc4"}
DARK = {"ground": "#0d1117", "ink": "#e6edf3", "muted": "#9198a1", "grid": "#2b323c", "band": "#151b23", "floor": "#9aa4b0"}
DARK |= {"v0": "#ff8f4c", "v1": "#6cb6ff"}
FONT = """
text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 12px }
.title { font-size: 18px; font-weight: 600 } .name { font-size: 13px; font-weight: 600 } .muted { font-size: 11px }
line { stroke-width: 1.5 } line.grid { stroke-width: 1 } line.floor { stroke-width: 2 }
"""


def colours(of):
    """Rules for all that has a colour: text and areas are filled, lines are drawn."""
    rules = [f"text {{ fill: {of['ink']} }} text.muted {{ fill: {of['muted']} }}"]
    rules += [f"rect.{name} {{ fill: {of[name]} }}" for name in ("ground", "band")]
    rules += [f"line.{name} {{ stroke: {of[name]} }}" for name in ("grid", "floor", "v0", "v1")]
    rules += [f"circle.{name}, text.{name} {{ fill: {of[name]} }}" for name in ("v0", "v1")]
    return "\n".join(rules)


STYLE = f"{FONT}{colours(LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{colours(DARK)}\n}}\n"


class Scale:
    """Milliseconds on a logarithmic axis from one power of ten to another."""

    def __init__(self, values, left, width):
        values = [value for value in values if value > 0] or [1, 10]
        self.first, self.last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self.last = max(self.last, self.first + 1)
        self.left, self.width = left, width

    def x(self, value):
        part = (math.log10(max(value, 10**self.first)) - self.first) / (self.last - self.first)
        return self.left + part * self.width

    def ticks(self):
        return [10.0**power for power in range(self.first, self.last + 1)]


def text(x, y, content, kind="", anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1, y1, x2, y2, kind):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def duration(ms):
    unit, value = ("s", ms / 1000) if ms >= 1000 else ("ms", ms)
    return f"{value:.{0 if value >= 100 or value == round(value) else 1 if value >= 10 else 2}f} {unit}"


def value_of(result, name, key):
    """A boot has one time alone, which is its total."""
    spreads = result.get("summary", {}).get(name, {})
    return spreads.get("boot_ms" if key == "total_ms" and "boot_ms" in spreads else key)


def render(results):
    scenarios, names = results["scenarios"], list(results["vmms"])
    bottom = HEAD + ROW * len(scenarios)
    parts = [f'<rect class="ground" width="{WIDTH}" height="{bottom + FOOT}" rx="6"/>', *_head(results, names)]
    scales = []
    for number, (key, _) in enumerate(PANELS):
        spreads = [value_of(result, name, key) for result in scenarios for name in names + ["floor"]]
        values = [spread[part] for spread in spreads if spread for part in ("min", "max")]
        scales.append(Scale(values, MARGIN + LABELS + number * (PANEL + GAP), PANEL - LABEL))
    for number, result in enumerate(scenarios):
        top = HEAD + ROW * number
        if number % 2 == 0:
            parts.append(f'<rect class="band" x="{MARGIN / 2}" y="{top}" width="{WIDTH - MARGIN}" height="{ROW}" rx="4"/>')
    for scale, (_, title) in zip(scales, PANELS):
        parts.append(text(scale.left, HEAD - 26, title, "name"))
        for tick in scale.ticks():
            parts.append(line(scale.x(tick), HEAD, scale.x(tick), bottom, "grid"))
            parts.append(text(scale.x(tick), HEAD - 8, duration(tick), "muted", "middle"))
    for number, result in enumerate(scenarios):
        parts += _row(result, names, scales, HEAD + ROW * number)
    parts.append(text(MARGIN, bottom + 26, _host(results), "muted"))
    size = f'viewBox="0 0 {WIDTH} {bottom + FOOT}" width="{WIDTH}" height="{bottom + FOOT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<style>{STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"


def _head(results, names):
    yield text(MARGIN, 36, f"{' and '.join(names)} migrate the same guest", "title")
    x = MARGIN
    for number, name in enumerate(names):
        yield f'<circle cx="{x + 5}" cy="58" r="5" class="v{number}"/>'
        yield text(x + 15, 62, name)
        x += 32 + 8 * len(name)
    yield line(x + 4, 51, x + 4, 65, "floor")
    rounds = f"{results['rounds']} rounds" if results["rounds"] > 1 else "one round"
    words = f"floor: as many bytes over one TCP connection. Median of {rounds}, whiskers from least to most; less is better."
    yield text(x + 14, 62, words, "muted")


def _row(result, names, scales, top):
    parts = [text(MARGIN, top + 19, result["name"], "name")]
    # A number stays with its unit.
    title = textwrap.wrap(re.sub(r"(\d) ", "\\1\u00a0", result["title"]), 42)
    parts += [text(MARGIN, top + 32 + 12 * number, words, "muted") for number, words in enumerate(title[:2])]
    if result["skipped"]:
        return parts + [text(scales[0].left, top + ROW / 2 + 4, f"not run: {result['skipped']}", "muted")]
    floor = result["summary"]["floor"].get("total_ms")
    if floor:
        x = scales[0].x(floor["median"])
        parts.append(line(x, top + 5, x, top + ROW - 5, "floor"))
    for number, name in enumerate(names):
        y = top + ROW * (number + 0.5 + 0.15 * (1 - 2 * number)) / len(names)
        runs = result["runs"][name]
        good = sum("steal" in run for run in runs)
        of_all = f" ({good} of {len(runs)})" if good < len(runs) else ""
        for (key, _), scale in zip(PANELS, scales):
            if spread := value_of(result, name, key):
                parts += _dot(spread, scale, y, f"v{number}", of_all)
        if not value_of(result, name, "total_ms"):
            words = describe(result["runs"][name][0])
            after = scales[0].x(floor["median"]) if floor else scales[0].left
            parts.append(text(after + 6, y + 4, f"{name}: {words.splitlines()[0][:80]}", f"v{number}"))
    return parts


def _dot(spread, scale, y, kind, of_all):
    low, middle, high = (scale.x(spread[key]) for key in ("min", "median", "max"))
    yield line(low, y, high, y, kind)
    for end in (low, high):
        yield line(end, y - 3, end, y + 3, kind)
    yield f'<circle cx="{middle:.1f}" cy="{y:.1f}" r="4.5" class="{kind}"/>'
    yield text(max(high, middle + 4) + 6, y + 4, duration(spread["median"]) + of_all)


def _host(results):
    host, versions = results["host"], [vmm["version"] for vmm in results["vmms"].values()]
    runs = [run for result in results["scenarios"] for runs in result["runs"].values() for run in runs]
    disturbed = f"{sum(run.get('disturbed', False) for run in runs)} of {len(runs)} runs had over {DISTURBED:.0%} steal"
    what = f"{'; '.join(versions)}. {host['processors']} x {host['processor']}, Linux {host['kernel']}, {results['date'][:10]}"
    return f"{what}. {disturbed}."
