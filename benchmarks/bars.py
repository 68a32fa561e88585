"""Draw horizontal bars as SVG, by hand: a picture needs no library."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH, LABELS, LINE = 720, 260, 22


def bars(title: str, values: Sequence[tuple[str, float]]) -> str:
    """Return an SVG with a bar for each value, the longest as wide as the picture.

    Args:
        title: a line above them.
        values: labels and values, at least 0.
    """
    most = max((value for _, value in values), default=0) or 1
    height = LINE * (len(values) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="8" y="{LINE - 6}" font-weight="bold">{escape(title)}</text>',
    ]
    for index, (label, value) in enumerate(values):
        top = LINE * (index + 1) + 4
        width = value / most * (WIDTH - LABELS - 60)
        lines += [
            f'<text x="{LABELS - 8}" y="{top + 14}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LABELS}" y="{top}" width="{width:.1f}" height="{LINE - 6}" '
            'fill="#3b6ea5"/>',
            f'<text x="{LABELS + width + 6:.1f}" y="{top + 14}">{value:.2f}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
