"""Draw curves and heat maps of a run as SVG, without scripts."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise

from moe_shard.training.layer_history import LayerRecord

Points = Sequence[tuple[int, float]]

CHART_STYLE = """
.charts { display: grid; gap: 12px 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.charts section { min-width: 0; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); }
svg .curve { stroke: var(--permute); stroke-width: 1.6; fill: none; stroke-linejoin: round; }
svg circle { fill: var(--permute); }
svg .heat { fill: var(--all-gather); }
svg .ground { fill: var(--track); }
.s0 { --hue: var(--permute); } .s1 { --hue: var(--all-gather); } .s2 { --hue: var(--all-to-all); }
.s3 { --hue: var(--reduce); } .s4 { --hue: var(--middling); } .s5 { --hue: #d0569b; }
.s6 { --hue: #1b9aaa; } .s7 { --hue: var(--rest); } .s8 { --hue: var(--ink); }
svg .series { stroke: var(--hue); stroke-width: 1.6; fill: none; stroke-linejoin: round; }
svg circle.dot { fill: var(--hue); }
.legend .bar.line { background: var(--hue); height: 4px; vertical-align: 3px; }
"""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 200, 64, 22, 10, 8
_MOST_POINTS = 600
_COLUMNS, _LEVELS = 100, 10


def curve(points: Points) -> str:
    """Draw one curve; of many points, the lowest and the highest of each part of it."""
    return _chart({"": points}, logarithmic=False)


def lines(series: Mapping[str, Points], *, logarithmic: bool = False) -> str:
    """Draw several curves in one chart, with a legend.

    Args:
        series: points by name.
        logarithmic: whether the vertical axis is; numbers that are not above zero are left out.
    """
    legend = "".join(
        f'<li><span class="bar line s{at % 9}"></span>{html.escape(name)}</li>'
        for at, name in enumerate(series)
    )
    return f'{_chart(series, logarithmic=logarithmic)}<ul class="legend">{legend}</ul>'


def heat_map(records: Sequence[LayerRecord], name: str, *, low_is_bad: bool) -> str:
    """Draw one number of each layer over the steps, a row a layer; what is bad is strong.

    Args:
        records: by step.
        name: the number, see `BY_LAYER`.
        low_is_bad: whether the lowest is strong, and not the highest.
    """
    last = records[-1]
    same = [each for each in records if each.layers == last.layers and name in each.by_layer]
    count = min(_COLUMNS, len(same))
    edges = [len(same) * at // count for at in range(count + 1)]
    columns = [
        [_mean([each.by_layer[name][row] for each in same[start:end]]) for row in _rows(last)]
        for start, end in pairwise(edges)
    ]
    known = [value for column in columns for value in column if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)

    def level(value: float | None) -> int:
        if value is None:
            return 0
        share = (value - low) / (high - low) if high > low else 0.0
        return round((1 - share if low_is_bad and high > low else share) * (_LEVELS - 1))

    across = (_WIDTH - _LEFT - _RIGHT) / count
    down = max(min(150 / len(last.layers), 22.0), 3.0)
    cells: dict[int, list[str]] = {}
    for row in _rows(last):
        levels = [level(column[row]) for column in columns]
        at = 0
        for each, run in groupby(levels):
            length = len(list(run))
            x, y = _LEFT + at * across, _TOP + row * down
            cells.setdefault(each, []).append(
                f"M{x:.1f} {y:.1f}h{length * across:.1f}v{down:.1f}h-{length * across:.1f}z"
            )
            at += length
    paths = "".join(
        f'<path class="heat" fill-opacity="{each / (_LEVELS - 1):.2f}" d="{"".join(cells[each])}"/>'
        for each in sorted(cells)
        if each
    )
    bottom = _TOP + len(last.layers) * down
    every = max(1, math.ceil(16 / down))
    names = "".join(
        f'<text x="{_LEFT - 6}" y="{_TOP + (row + 0.5) * down + 4:.1f}" text-anchor="end">'
        f"{'layer ' if row == 0 else ''}{last.layers[row]}</text>"
        for row in _rows(last)
        if row % every == 0
    )
    faint, strong = (high, low) if low_is_bad else (low, high)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {bottom + _BOTTOM:.0f}" role="img">'
        f'<rect class="ground" x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}" '
        f'height="{bottom - _TOP:.1f}"/>{paths}{names}'
        f"{_steps(same[0].step, same[-1].step, bottom + 16)}"
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{bottom + 16:.1f}" text-anchor="middle">'
        f"faint {short(faint)}, strong {short(strong)}</text></svg>"
    )


def short(value: float) -> str:
    """Format a number of an axis."""
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.{4 if abs(value) >= 0.01 else 2}g}"


def _chart(series: Mapping[str, Points], *, logarithmic: bool) -> str:
    drawn = {
        name: [(step, math.log10(value) if logarithmic else value) for step, value in points]
        for name, points in (
            (name, [each for each in points if each[1] > 0 or not logarithmic])
            for name, points in series.items()
        )
    }
    everything = [point for points in drawn.values() for point in points]
    if not everything:
        return ""
    low, high = min(v for _, v in everything), max(v for _, v in everything)
    first, last = min(s for s, _ in everything), max(s for s, _ in everything)
    span, length = (high - low) or 1.0, (last - first) or 1

    def y_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / span * (_HEIGHT - _BOTTOM - _TOP)

    def x_of(step: int) -> float:
        return _LEFT + (step - first) / length * (_WIDTH - _LEFT - _RIGHT)

    def path(at: int, points: Points, alone: bool) -> str:
        kinds = ("curve", "") if alone else (f"series s{at % 9}", f' class="dot s{at % 9}"')
        if len(points) == 1:
            (step, value) = points[0]
            return f'<circle{kinds[1]} cx="{x_of(step):.1f}" cy="{y_of(value):.1f}" r="3"/>'
        places = " ".join(f"{x_of(step):.1f},{y_of(value):.1f}" for step, value in _thinned(points))
        return f'<polyline class="{kinds[0]}" points="{places}"/>'

    levels = (low, (low + high) / 2, high) if high > low else (low,)
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
        f"{short(10**value if logarithmic else value)}</text>"
        for value, y in ((value, y_of(value)) for value in levels)
    )
    paths = "".join(
        path(at, points, len(drawn) == 1 and "" in drawn)
        for at, points in enumerate(drawn.values())
        if points
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{grid}'
        f"{_steps(first, last, _HEIGHT - 4)}{paths}</svg>"
    )


def _steps(first: int, last: int, y: float) -> str:
    end = (
        f'<text x="{_WIDTH - _RIGHT}" y="{y:.1f}" text-anchor="end">{last}</text>'
        if last > first
        else ""
    )
    return f'<text x="{_LEFT}" y="{y:.1f}">step {first}</text>{end}'


def _rows(record: LayerRecord) -> range:
    return range(len(record.layers))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _thinned(points: Points) -> Points:
    if len(points) <= _MOST_POINTS:
        return points
    parts = _MOST_POINTS // 2
    found: list[tuple[int, float]] = []
    for at in range(parts):
        part = points[len(points) * at // parts : len(points) * (at + 1) // parts]
        extremes = {min(part, key=lambda each: each[1]), max(part, key=lambda each: each[1])}
        found += sorted(extremes)
    return found
