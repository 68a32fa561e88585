"""Profile a few steps, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import jax

from moe_shard.config.schema import TrainConfig


class StepProfile:
    """Profile some steps of a run if `profile` is set; close the profile when the block ends.

    Args:
        folder: where to write the profile.
        config: names the steps to profile.
        first_step: first step of this process.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, first_step: int) -> None:
        self._folder = folder
        start = first_step + config.skip_first_n_steps_for_profiler
        self._steps = range(start, start + config.profiler_steps) if config.profile else range(0)
        self._open = False

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def before(self, step: int) -> None:
        """Open or close the profile, depending on whether it includes this step."""
        if step in self._steps and not self._open:
            jax.profiler.start_trace(str(self._folder))
            self._open = True
        elif step not in self._steps:
            self._close()

    def _close(self) -> None:
        if self._open:
            jax.profiler.stop_trace()
            self._open = False
