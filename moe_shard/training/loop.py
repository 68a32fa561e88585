"""The training loop: batches in, records and checkpoints out, until done or asked to stop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console

from moe_shard.config.hardware import find_hardware
from moe_shard.config.schema import Config
from moe_shard.errors import Finding
from moe_shard.models.flops import train_flops_per_token
from moe_shard.training.checkpoint import Checkpointer
from moe_shard.training.data import Batches, batches
from moe_shard.training.metrics import MetricsWriter, Record
from moe_shard.training.progress import ProgressLine
from moe_shard.training.step import Metrics, Program, TrainState
from moe_shard.training.stop import StopRequest


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        updates: made in all, those of earlier processes included.
        stopped_by: what asked it to stop early, or None.
        last: the record of the last step this process made; None if it made none.
    """

    updates: int
    stopped_by: str | None
    last: Record | None


def train(
    config: Config, program: Program, step: jax.stages.Compiled, folder: Path, console: Console
) -> Outcome:
    """Train from the newest checkpoint, or from the start, to `steps`.

    Args:
        config: the run.
        program: the step's surroundings.
        step: `program.step`, compiled.
        folder: of the run.
        console: for progress.

    Raises:
        UserError: the text cannot be read, or the checkpoint does not fit.
        Finding: the loss is no longer finite.
    """
    checkpointer = Checkpointer(folder / "checkpoints", config) if _keeps(config) else None
    try:
        first = checkpointer.latest() if checkpointer else None
        if checkpointer is None or first is None:
            first, state = 0, program.init(jax.random.key(config.train.seed))
        else:
            state = checkpointer.restore(first, program.abstract_state)
            console.print(f"continuing from the checkpoint after step {first}")
        if first >= config.train.steps:
            return Outcome(first, None, None)
        return _Run(config, program, step, folder, console, checkpointer, first).run(state)
    finally:
        if checkpointer:
            checkpointer.close()


def _keeps(config: Config) -> bool:
    return config.train.enable_checkpointing and config.train.steps > 0


class _Run:
    """One process's share of a run: from its first step to the end."""

    def __init__(
        self,
        config: Config,
        program: Program,
        step: jax.stages.Compiled,
        folder: Path,
        console: Console,
        checkpointer: Checkpointer | None,
        first: int,
    ) -> None:
        self.config, self.step, self.folder, self.console = config, step, folder, console
        self.checkpointer, self.first = checkpointer, first
        self.shape = program.abstract_batch["inputs"].shape
        self.sharding = program.batch_sharding
        devices = jax.device_count()
        self.tokens_per_device = math.prod(self.shape) / devices
        self.flops_per_token = train_flops_per_token(config.model, seq_len=self.shape[-1])
        hardware = find_hardware(jax.devices()[0].device_kind)
        self.peak_flops = hardware.peak_flops.get(config.model.dtype) if hardware else None
        self.last: Record | None = None

    def run(self, state: TrainState) -> Outcome:
        train = self.config.train
        data = batches(
            self.config.data,
            vocab_size=self.config.model.vocab_size,
            seq_len=self.shape[2],
            rows=self.shape[1],
            microbatches=self.shape[0],
            sharding=self.sharding,
            first_step=self.first,
        )
        is_writer = jax.process_index() == 0
        self.writer = (
            MetricsWriter(self.folder, first_step=self.first, tensorboard=train.enable_tensorboard)
            if is_writer
            else None
        )
        self.progress = ProgressLine(
            self.console,
            first_step=self.first,
            steps=train.steps,
            log_period=train.log_period,
            bytes_per_token=None if self.config.data.tokenizer_path else 1.0,
        )
        try:
            with StopRequest() as stop, self.progress:
                updates = self._steps(state, data, stop)
        finally:
            data.close()
            if self.writer:
                self.writer.close()
        return Outcome(updates, stop.reason if updates < train.steps else None, self.last)

    def _steps(self, state: TrainState, data: Batches, stop: StopRequest) -> int:
        """Make the steps; one is always in flight while the one before it is recorded."""
        train = self.config.train
        pending: tuple[int, Metrics] | None = None
        self.finished_at = time.perf_counter()
        for step in range(self.first, train.steps):
            self._profile(step)
            state, metrics = self.step(state, next(data))
            if pending:
                self._record(*pending)
            pending = step, metrics
            updates = step + 1
            last = updates == train.steps
            stopping = stop.reason is not None or (
                self.checkpointer is not None and self.checkpointer.reached_preemption(updates)
            )
            due = updates % train.checkpoint_period == 0
            if stopping or due or last:
                # Known to be finite before it is kept.
                self._record(*pending)
                pending = None
                if self.checkpointer and (stopping or due or train.save_checkpoint_on_completion):
                    self.checkpointer.save(state, updates=updates)
            if stopping:
                stop.reason = stop.reason or "preemption"
                self._end_profile(step)
                return updates
        self._end_profile(train.steps)
        return train.steps

    def _record(self, step: int, metrics: Metrics) -> None:
        """Wait for a step, write its record and show it."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self.finished_at = now - self.finished_at, now
        tokens_per_second = self.tokens_per_device / seconds
        flops = tokens_per_second * self.flops_per_token
        record: Record = {
            "step": step,
            **values,
            "step_time_s": seconds,
            "tokens_per_sec_per_device": tokens_per_second,
            "tflops_per_sec_per_device": flops / 1e12,
            "mfu": flops / self.peak_flops if self.peak_flops else None,
        }
        if not math.isfinite(values["loss"]):
            raise Finding(
                f"the loss is {values['loss']} at step {step}; nothing of this step was saved\n"
                "fix: a lower learning_rate, or gradient_clipping_threshold=1.0; the same command "
                "continues from the last checkpoint"
            )
        if self.writer:
            self.writer.write(record)
        self.progress.show(record)
        self.last = record

    def _profile(self, step: int) -> None:
        train = self.config.train
        start = self.first + train.skip_first_n_steps_for_profiler
        if train.profile and step == start:
            jax.profiler.start_trace(str(self.folder / "profile"))
        if train.profile and step == start + train.profiler_steps:
            jax.profiler.stop_trace()

    def _end_profile(self, step: int) -> None:
        """Close a profile that the run's end cuts short."""
        start = self.first + self.config.train.skip_first_n_steps_for_profiler
        if self.config.train.profile and start < step <= start + self.config.train.profiler_steps:
            jax.profiler.stop_trace()
