"""Format sizes, work and times for people."""

from __future__ import annotations


def human_bytes(size: float) -> str:
    """Format a number of bytes in powers of 1000, such as "44 B", "4.1 kB", "262 kB"."""
    if abs(size) < 1000:
        return f"{size:.0f} B"
    units = ["TB", "GB", "MB", "kB"]
    while abs(size) >= 1000 and units:
        size /= 1000
        unit = units.pop()
    return f"{size:.{0 if abs(size) >= 100 else 1}f} {unit}"


def human_flops(count: float) -> str:
    """Format a number of operations, such as "4.4 PFLOP", "550 GFLOP"."""
    for factor, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if abs(count) >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def human_seconds(seconds: float) -> str:
    """Format a time, such as "2.35 s", "48.1 ms", "310 us"."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if abs(seconds) * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("the last unit takes everything")
