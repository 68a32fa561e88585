"""Draw curves over a common axis as SVG, by hand: a picture needs no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 720, 320, 56, 40, 28, 16
COLORS = ("#9db8d2", "#c2410c", "#3b6ea5", "#4d7c0f")


def lines(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return an SVG with a curve for each name, and the last value of each in the legend.

    Args:
        title: a line above them.
        curves: name -> points (x, y), at least one each.
    """
    every = [point for points in curves.values() for point in points]
    low_x, high_x = min(x for x, _ in every), max(x for x, _ in every)
    low_y, high_y = min(y for _, y in every), max(y for _, y in every)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / ((high_x - low_x) or 1)
        up = (y - low_y) / ((high_y - low_y) or 1)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for value in (low_y, (low_y + high_y) / 2, high_y):
        _, y = at(low_x, value)
        drawn += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>',
        ]
    for value, anchor in ((low_x, "start"), (high_x, "end")):
        x, _ = at(value, low_y)
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{value:,g}</text>')
    for index, (name, points) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        line = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in points)
        drawn += [
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>',
            f'<text x="{WIDTH - RIGHT}" y="{TOP + 20 * (index + 1)}" text-anchor="end" '
            f'fill="{color}">{escape(name)}: {points[-1][1]:.3f} at the end</text>',
        ]
    return "\n".join([*drawn, "</svg>", ""])
