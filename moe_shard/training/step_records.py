"""Write what each step computed to the run's files and the terminal, and hear of bad ones."""

from __future__ import annotations

import math
import time

import jax

from moe_shard.config.hardware import find_hardware
from moe_shard.config.schema import Config
from moe_shard.program.step import Batch, Metrics, Program, TrainState
from moe_shard.training.bad_steps import BadSteps
from moe_shard.training.goodput import WallTime
from moe_shard.training.layer_records import LayerRecords
from moe_shard.training.metrics import MetricsWriter, Record
from moe_shard.training.pace import Pace
from moe_shard.training.progress import ProgressLine


class StepRecords:
    """Make the record of each step, and pass it on.

    Attributes:
        last: the newest record; None before the first.

    Args:
        config: says how often layers are recorded.
        program: says how much work a step is, and which kinds of parameters there are.
        writer: writes records to files.
        progress: shows them.
        wall: receives the number of steps made.
        bad_steps: receives every step.
    """

    def __init__(
        self,
        config: Config,
        program: Program,
        *,
        writer: MetricsWriter,
        progress: ProgressLine,
        wall: WallTime,
        bad_steps: BadSteps,
    ) -> None:
        self._period = config.train.log_period
        self._writer, self._progress = writer, progress
        self._wall, self._bad_steps = wall, bad_steps
        self._layers = LayerRecords(config.model, program)
        self._without_layers: tuple[int, Metrics] | None = None
        shape = program.abstract_batch["inputs"].shape
        hardware = find_hardware(jax.devices()[0].device_kind)
        self._pace = Pace(
            tokens=math.prod(shape) / jax.device_count(),
            flops_per_token=program.flops_per_token,
            peak_flops=hardware.peak_flops.get(config.model.dtype) if hardware else None,
        )
        self.last: Record | None = None
        self.start_clock()

    def start_clock(self) -> None:
        """Count the next step's time from now on."""
        self._finished_at = time.perf_counter()

    def write(self, step: int, metrics: Metrics, batch: Batch, state: TrainState) -> None:
        """Wait for a step, write its record and show it; see `BadSteps` for one that was skipped.

        Args:
            step: its number.
            metrics: what it computes.
            batch: its batch.
            state: the newest state.

        Raises:
            Finding: too many steps in a row were skipped.
        """
        scalars = {name: value for name, value in metrics.items() if not value.ndim}
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        now = time.perf_counter()
        seconds, self._finished_at = now - self._finished_at, now
        record = self._pace.record(step, values, seconds)
        self._writer.write(record)
        self._without_layers = (step, metrics)
        if step % self._period == 0:
            self.write_layers()
        self._wall.made(step + 1)
        self._progress.show(record)
        self.last = record
        self._bad_steps.see(step, values, state, batch)

    def write_layers(self) -> None:
        """Write the record of layers of the newest step, unless it has been written."""
        if self._without_layers:
            self._writer.write_layers(self._layers.record(*self._without_layers))
            self._without_layers = None
