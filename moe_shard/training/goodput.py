"""Account for a run's wall time: its steps, and what took the rest, over all of its starts.

Goodput is the share of the time since a run was first started in which it made steps that were
kept (the word is that of Google's ML Goodput Measurement). `goodput.json` has an entry for each
start, so that the time between two starts counts, and the steps that a kill undid.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_shard.files import read_small, write_text
from moe_shard.units import human_time_left

FILE = "goodput.json"
STEPS, _OTHER = "steps", "other"
PARTS = (STEPS, "compile", "init", "restore", "data", "save", "evaluate", _OTHER)
"""What a process does; `init` makes the first state, `data` waits for text while no step runs."""

_WRITE_SECONDS = 10.0


@dataclass
class Start:
    """Hold the time of one process of a run.

    Attributes:
        started: seconds since 1970 at which the run was opened.
        first_step: the step that it began with.
        ended: seconds since 1970 of the last entry.
        updates: updates made by then, those of earlier starts included.
        seconds: {part: time}.
    """

    started: float
    first_step: int
    ended: float
    updates: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Goodput:
    """Hold where the time of a run went.

    Attributes:
        total_s: seconds from the first start to the last entry.
        share: goodput, 0 to 1.
        seconds: {part: time}, the most first; `steps` are those that were kept, `repeated` the
            steps that were undone by the end of a process, `down` the time between two starts.
        starts: number of starts.
    """

    total_s: float
    share: float
    seconds: dict[str, float]
    starts: int

    def line(self) -> str:
        """Write the shares in a line."""
        rest = [
            f"{name} {100 * seconds / self.total_s:.0f}%"
            for name, seconds in self.seconds.items()
            if name != STEPS and seconds >= 0.005 * self.total_s
        ]
        starts = f" ({self.starts} starts)" if self.starts > 1 else ""
        return (
            f"goodput: {100 * self.share:.0f}% of {human_time_left(self.total_s)}{starts} "
            f"in steps{', the rest: ' if rest else ''}{', '.join(rest)}"
        )


class WallTime:
    """Measure what a process spends its time on, and keep it in the run's folder.

    At each moment one part counts: the innermost block of `part` that is open, else `other`.

    Args:
        folder: folder of the run.
        writer: whether this process writes the file; the others measure only.
        clock: seconds since 1970.
    """

    def __init__(
        self, folder: Path, *, writer: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        self._path, self._writer, self._clock = folder / FILE, writer, clock
        self._earlier = read_starts(folder)
        self._open = [_OTHER]
        self._since = self._written = clock()
        self._start = Start(self._since, 0, self._since, 0)

    def __enter__(self) -> WallTime:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block, without that of blocks within it, as this part."""
        assert name in PARTS
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    @contextmanager
    def waiting(self, name: str, *, hidden: Callable[[], bool]) -> Iterator[None]:
        """Count the block as this part, unless `hidden` says after it that a step still runs."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            if hidden():
                self._open.pop()
                self._count()
            else:
                self._count()
                self._open.pop()

    def begin(self, first_step: int) -> None:
        """Set the step that this process begins with, and write the file.

        A process that is killed within seconds would not be in it otherwise, nor the time it took.
        """
        self._start.first_step = self._start.updates = first_step
        self.write()

    def made(self, updates: int) -> None:
        """Count updates up to this number as made; write the file if it is some seconds old."""
        self._start.updates = updates
        if self._clock() - self._written >= _WRITE_SECONDS:
            self.write()

    def goodput(self) -> Goodput | None:
        """Return where the time went until now; None if none has passed."""
        self._count()
        return goodput([*self._earlier, self._start])

    def write(self) -> None:
        """Write the file; a disk that is full does not end a run for it."""
        self._count()
        self._written = self._since
        if self._writer:
            content = {"starts": [asdict(each) for each in (*self._earlier, self._start)]}
            with suppress(OSError):
                write_text(self._path, json.dumps(content) + "\n")

    def _count(self) -> None:
        now = self._clock()
        seconds = self._start.seconds
        seconds[self._open[-1]] = seconds.get(self._open[-1], 0.0) + max(now - self._since, 0.0)
        self._since = self._start.ended = now


def read_starts(folder: Path) -> list[Start]:
    """Read the starts of a run; none where the file is missing or is not what a run wrote."""
    try:
        content: Any = json.loads(read_small(folder / FILE))
        starts = [
            Start(
                float(each["started"]),
                int(each["first_step"]),
                float(each["ended"]),
                int(each["updates"]),
                {str(part): float(seconds) for part, seconds in each["seconds"].items()},
            )
            for each in content["starts"]
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    except (ArithmeticError, RecursionError):
        return []
    numbers = [
        number for each in starts for number in (each.started, each.ended, *each.seconds.values())
    ]
    return starts if all(map(math.isfinite, numbers)) else []


def goodput(starts: Sequence[Start]) -> Goodput | None:
    """Add up the starts of a run; None where no time has passed.

    A start that begins before the last step of the one before it repeats steps; those count at the
    mean time of a step of that earlier process.
    """
    seconds: dict[str, float] = dict.fromkeys((*PARTS, "repeated", "down"), 0.0)
    for before, each in zip([None, *starts], starts, strict=False):
        for part, spent in each.seconds.items():
            seconds[part if part in PARTS else _OTHER] += spent
        if before is None:
            continue
        seconds["down"] += max(each.started - before.ended, 0.0)
        undone, made = before.updates - each.first_step, before.updates - before.first_step
        if undone > 0 and made > 0:
            repeated = before.seconds.get(STEPS, 0.0) * min(undone / made, 1.0)
            seconds["repeated"] += repeated
            seconds[STEPS] -= repeated
    total = sum(seconds.values())
    if total <= 0:
        return None
    largest = sorted(seconds.items(), key=lambda item: -item[1])
    kept = {part: spent for part, spent in largest if spent > 0}
    return Goodput(total, max(seconds[STEPS], 0.0) / total, kept, len(starts))
