"""Format sizes, work, times and numbers for people."""

from __future__ import annotations

from collections.abc import Sequence


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


def human_time_left(seconds: float) -> str:
    """Format a time to wait such as "0:00:07", "1:02:00"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def human_count(number: int, noun: str) -> str:
    """Format a number of things such as "1 layer", "2 layers"; the plural takes an s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def human_ranges(numbers: Sequence[int], most: int | None = None) -> str:
    """Format ascending numbers with runs joined, such as "1, 3, 5-7".

    Args:
        numbers: ascending.
        most: runs that are written out before "..."; None: all.
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join([*words[:most], *(["..."] if len(words[:most]) < len(words) else [])])
