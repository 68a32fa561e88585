"""Render how a run is doing as one HTML page, with its curves as SVG.

Like the lowering page it needs no network and runs no script; its content policy forbids both.
"""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Iterable, Sequence

from moe_shard.training.goodput import STEPS, Goodput
from moe_shard.training.run_status import RunStatus
from moe_shard.units import human_time_left

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 200, 64, 22, 10
_MOST_POINTS = 600
_STYLE = """
.curves { display: grid; gap: 12px 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); }
svg .curve { stroke: var(--permute); stroke-width: 1.6; fill: none; stroke-linejoin: round; }
.bar.steps { background: var(--all-to-all); }
.bar.compile { background: var(--permute); }
.bar.down, .bar.repeated { background: var(--all-gather); }
.bar.save, .bar.restore, .bar.init, .bar.evaluate { background: var(--reduce); }
.bar.data { background: var(--middling); }
.bar.other { background: var(--rest); }
"""


def render_status(status: RunStatus) -> str:
    """Return the text of the page."""
    css = importlib.resources.files("moe_shard.lowering").joinpath("page.css")
    curves = "\n".join(
        f"<section><h3>{html.escape(name)}</h3>{_curve(points)}</section>"
        for name, points in status.curves().items()
    )
    lines = "\n".join(f"<p>{html.escape(line)}</p>" for line in status_lines(status))
    time = f"<h3>Where the time went</h3>{_time(status.goodput)}" if status.goodput else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(status.name)}</title>
<style>
{css.read_text(encoding="utf-8")}{_STYLE}</style>
</head>
<body>
<header>
<h1>{html.escape(status.name)}</h1>
{lines}
</header>
<main>
{time}
<div class="curves">
{curves or "<p>no step has been recorded yet</p>"}
</div>
</main>
</body>
</html>
"""


def status_lines(status: RunStatus) -> Iterable[str]:
    """Say in a line each how far the run is, what its step lowers to, and what is kept."""
    of = "" if status.steps is None else f" of {status.steps}"
    state = "running" if status.running else "not running on this machine"
    left = "" if status.left_s is None else f", {human_time_left(status.left_s)} left at this pace"
    yield f"{state}: step {status.updates}{of}{left}"
    if status.verdict:
        yield f"its step is {status.verdict}"
    if status.goodput:
        yield status.goodput.line()
    if status.checkpoints:
        kept = ", ".join(map(str, status.checkpoints[-5:]))
        yield f"checkpoints after steps {'..., ' if len(status.checkpoints) > 5 else ''}{kept}"
    if status.set_aside:
        yield f"set aside as damaged: {', '.join(status.set_aside)}"


def _time(spent: Goodput) -> str:
    bars = "".join(
        f'<span class="bar {part}" style="width:{100 * seconds / spent.total_s:.3f}%" '
        f'title="{part} {human_time_left(seconds)}"></span>'
        for part, seconds in spent.seconds.items()
    )
    legend = "".join(
        f'<li><span class="bar {part}"></span>{part}{" (kept)" if part == STEPS else ""} '
        f"{100 * seconds / spent.total_s:.1f}%</li>"
        for part, seconds in spent.seconds.items()
    )
    return f'<div class="track">{bars}</div><ul class="legend">{legend}</ul>'


def _curve(points: Sequence[tuple[int, float]]) -> str:
    """Draw a curve; of many points, the lowest and the highest of each part of it."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high, first, last = min(values), max(values), steps[0], steps[-1]
    span, length = (high - low) or 1.0, (last - first) or 1

    def place(step: int, value: float) -> str:
        x = _LEFT + (step - first) / length * (_WIDTH - _LEFT - 8)
        y = _HEIGHT - _BOTTOM - (value - low) / span * (_HEIGHT - _BOTTOM - _TOP)
        return f"{x:.1f},{y:.1f}"

    line = " ".join(place(step, value) for step, value in _thinned(points))
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        for value in (low, (low + high) / 2, high)
        for y in [_HEIGHT - _BOTTOM - (value - low) / span * (_HEIGHT - _BOTTOM - _TOP)]
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{grid}'
        f'<text x="{_LEFT}" y="{_HEIGHT - 4}">step {first}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 4}" text-anchor="end">{last}</text>'
        f'<polyline class="curve" points="{line}"/></svg>'
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    parts = _MOST_POINTS // 2
    if len(points) <= _MOST_POINTS:
        return list(points)
    found = []
    for at in range(parts):
        part = points[len(points) * at // parts : len(points) * (at + 1) // parts]
        extremes = {min(part, key=lambda each: each[1]), max(part, key=lambda each: each[1])}
        found += sorted(extremes)
    return found
