"""Profile a few steps, for TensorBoard's profiler or Perfetto, and say where their time went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from moe_shard.config.schema import TrainConfig
from moe_shard.errors import UserError
from moe_shard.files import write_text
from moe_shard.lowering.collectives import Extraction
from moe_shard.lowering.kernel_stages import KernelStages
from moe_shard.lowering.kernel_sums import kernel_times
from moe_shard.lowering.kernel_times import KernelTimes
from moe_shard.runtime.trace_events import read_events

PROGRAM = "train_step.after_optimizations.txt"
"""The file beside a profile with the text of the step, by which its kernels are read."""


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

    def __exit__(self, *_: object) -> None:
        self._close()

    def before(self, step: int, previous: Any = None) -> None:
        """Open or close the profile, depending on whether it includes this step.

        Args:
            step: the step to be started.
            previous: arrays that the step before computes; a profile opens and closes once they
                are there, so that it holds whole steps.
        """
        if (step in self._steps) != self._open:
            jax.block_until_ready(previous)
        if step in self._steps and not self._open:
            jax.profiler.start_trace(str(self._folder))
            self._open = True
        elif step not in self._steps:
            self._close()

    def _close(self) -> None:
        if self._open:
            jax.profiler.stop_trace()
            self._open = False


def read_times(folder: Path, extraction: Extraction) -> KernelTimes:
    """Attribute the kernels of the newest profile of a folder to the stages of the step.

    Args:
        folder: holds profiles at any depth.
        extraction: the step.

    Raises:
        UserError: there is no profile, or it holds no kernel of this step.
    """
    found = kernel_times(read_events(folder), KernelStages(extraction))
    if found is None:
        raise UserError(
            f"the profile in {folder} holds no kernel of {extraction.module.name}\n"
            "fix: profile the program that is read here; on GPU the profiler may lack permission"
        )
    return found


def show_times(folder: Path, hlo: str, extraction: Extraction, console: Console) -> None:
    """Print where the time of the profiled steps went, and keep it as `kernel_times.json`.

    What cannot be read is said in a line: the run has succeeded.

    Args:
        folder: the run's folder of the profile.
        hlo: the text of the step.
        extraction: the same, read.
        console: where to print.
    """
    try:
        found = read_times(folder, extraction)
    except UserError as error:
        console.print(f"no kernel times: {error}", markup=False, soft_wrap=True)
        return
    write_text(folder / PROGRAM, hlo)
    write_text(folder / "kernel_times.json", json.dumps(found.to_json(), indent=1) + "\n")
    found.render_table(console)
