"""Follow the steps that were skipped, and end the run when many of them follow each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from moe_shard.config.schema import Config
from moe_shard.data.corpus import Say
from moe_shard.errors import Finding
from moe_shard.program.step import Batch, Program, TrainState
from moe_shard.training.post_mortem import examine

LINES = 5
"""Skipped steps that are shown one by one; later ones are shown at every doubling of the number."""
ZERO_STEPS = 10
"""Steps in a row with a gradient of exactly zero before that is said."""


class BadSteps:
    """Count skipped steps, say so, and end the run after too many in a row.

    Args:
        config: states how many in a row end the run.
        program: computes the norms of the last one.
        folder: folder of the run, for the post-mortem.
        say: receives a line about a skipped step.
    """

    def __init__(self, config: Config, program: Program, folder: Path, say: Say) -> None:
        self._config, self._program, self._folder, self._say = config, program, folder, say
        self._most = config.train.max_consecutive_bad_steps
        self.in_a_row = self._total = self._zeros = 0

    @property
    def next_may_end_the_run(self) -> bool:
        """Return whether one more bad step ends the run.

        Its parameters are those of the post-mortem, so no other step may be started before it is
        known.
        """
        return 0 < self._most <= self.in_a_row + 1

    def see(self, step: int, values: Mapping[str, float], state: TrainState, batch: Batch) -> None:
        """Follow one step.

        Args:
            step: its number.
            values: its metrics.
            state: the state after it.
            batch: its batch.

        Raises:
            Finding: it is the last of too many bad steps in a row.
        """
        self._see_zero(step, values["grad_norm"])
        if not values["skipped"]:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self._total += 1
        if self.in_a_row == self._most:
            raise Finding(
                f"{_count(self.in_a_row)} skipped, the last at step {step}: {reason(values)}\n"
                + examine(
                    self._folder, self._config.train, self._program, step, values, state, batch
                )
            )
        if self._total <= LINES or self._total & (self._total - 1) == 0:
            again = f" ({self._total} so far)" if self._total > 1 else ""
            self._say(f"step {step} was skipped{again}: {reason(values)}")

    def _see_zero(self, step: int, grad_norm: float) -> None:
        self._zeros = self._zeros + 1 if grad_norm == 0 else 0
        if self._zeros == ZERO_STEPS:
            self._say(
                f"the gradient has been exactly zero for {ZERO_STEPS} steps, up to step {step}: "
                "nothing is learned (parameters that are all zero, or products below the smallest "
                f"number of dtype={self._config.model.dtype})"
            )


def reason(values: Mapping[str, float]) -> str:
    """Say which number of a skipped step is not finite, in the order in which they are computed."""
    shown = {"loss": "loss", "grad_norm": "gradient's norm", "update_norm": "update's norm"}
    for name, words in shown.items():
        if not math.isfinite(values[name]):
            return f"the {words} is {values[name]}"
    return "it is a spike"


def _count(steps: int) -> str:
    return "1 step was" if steps == 1 else f"{steps} steps in a row were"
