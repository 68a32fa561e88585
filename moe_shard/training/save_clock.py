"""Tell when a checkpoint is due by the clock, alike on all processes."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all


class SaveClock:
    """Count the minutes since the last checkpoint.

    Clocks differ between processes, and all have to save after the same step. So the first one
    looks at its clock and tells the others, at steps known to all: about half of what remains is
    waited until the next look, so that a period takes a few messages, not one a step.

    Args:
        minutes: between two checkpoints; 0: none is due by the clock.
        clock: returns seconds.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._period, self._clock = 60 * minutes, clock
        self._saved = self._looked = clock()
        self._looked_at: int | None = None
        self._next = 0

    def due(self, updates: int) -> bool:
        """Return whether to save now; every process calls it after every step.

        Args:
            updates: the number of updates made.
        """
        if self._period == 0 or updates < self._next:
            return False
        due, wait = self._look(updates)
        if jax.process_count() > 1:
            due, wait = np.asarray(broadcast_one_to_all(np.array([due, wait], np.int32))).tolist()
        self._next = updates + wait
        return bool(due)

    def saved(self) -> None:
        """Start to count again: a checkpoint is being saved for whatever reason."""
        self._saved = self._clock()

    def _look(self, updates: int) -> tuple[int, int]:
        """Return whether a checkpoint is due, and the updates to wait until the next look."""
        now = self._clock()
        if jax.process_count() == 1:
            return int(now - self._saved >= self._period), 1
        made = updates - self._looked_at if self._looked_at is not None else 1
        step_s = max((now - self._looked) / max(made, 1), 1e-6)
        self._looked, self._looked_at = now, updates
        left = self._period - (now - self._saved)
        remaining = left if left > 0 else self._period
        return int(left <= 0), max(1, min(int(remaining / 2 / step_s), 2**20))
