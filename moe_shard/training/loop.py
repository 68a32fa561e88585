"""Run the training loop: consume batches, write records and checkpoints, stop on request."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from moe_shard.checkpoints.checkpoint import Checkpointer
from moe_shard.checkpoints.imported import find_weights
from moe_shard.checkpoints.run_files import checkpoints_of
from moe_shard.checkpoints.tiers import open_checkpoints
from moe_shard.config.schema import Config
from moe_shard.data.batches import Batches, batches
from moe_shard.data.corpus import Say
from moe_shard.data.held_out import HeldOutText, held_out_texts
from moe_shard.program.step import Batch, Metrics, Program, TrainState
from moe_shard.runtime.team import Team
from moe_shard.training.bad_steps import BadSteps
from moe_shard.training.first_params import first_params
from moe_shard.training.goodput import STEPS, WallTime
from moe_shard.training.held_out_loss import HeldOutLoss
from moe_shard.training.metrics import MetricsWriter, Record
from moe_shard.training.profile import StepProfile
from moe_shard.training.progress import ProgressLine
from moe_shard.training.save_clock import SaveClock
from moe_shard.training.step_records import StepRecords
from moe_shard.training.wandb_log import wandb_sinks


@dataclass(frozen=True)
class Outcome:
    """Describe how a run ended.

    Attributes:
        updates: number of updates, those of earlier processes included.
        stopped_by: what stopped it early, or None.
        last: record of the last step of this process; None if it made none.
        ended_by: why the evaluation ended the run before its last step, or None.
    """

    updates: int
    stopped_by: str | None
    last: Record | None
    ended_by: str | None = None


class Trainer:
    """Train from the newest checkpoint, or the start, to the end of the run.

    The constructor finds the first step and starts to read the text, so that errors in either show
    before a long compilation, and reading overlaps with it.

    Args:
        config: configuration of the run.
        program: the training step, described.
        folder: folder of the run.
        wall: receives what the time is spent on.
        say: receives a line about work that takes long.

    Raises:
        UserError: the text cannot be read, the checkpoint is from another model, or
            load_parameters_path holds no parameters.
    """

    def __init__(
        self,
        config: Config,
        program: Program,
        folder: Path,
        *,
        wall: WallTime,
        say: Say = lambda _: None,
    ) -> None:
        self.config, self.program, self.folder, self.wall = config, program, folder, wall
        self.say = say
        train = config.train
        self.checkpointer: Checkpointer | None = None
        self.data: Batches | None = None
        self.held_out: tuple[HeldOutText, ...] = ()
        self.first = 0
        microbatches, rows, seq_len = program.abstract_batch["inputs"].shape
        with ExitStack() as opening:
            if train.enable_checkpointing and train.steps > 0:
                self.checkpointer = open_checkpoints(
                    checkpoints_of(folder), config, program.abstract_state, say=say
                )
                opening.callback(self.checkpointer.close)
                self.first = self.checkpointer.first()
                if self.first:
                    self.checkpointer.check_fits(self.first)
            if config.run.load_parameters_path and not self.first:
                find_weights(config.run.load_parameters_path)
            if self.first < train.steps:
                self.data = batches(
                    config.data,
                    vocab_size=config.model.vocab_size,
                    seq_len=seq_len,
                    rows=rows,
                    microbatches=microbatches,
                    sharding=program.batch_sharding,
                    first_step=self.first,
                    say=say,
                )
                opening.callback(self.data.close)
                if config.evaluation.eval_interval != -1:
                    self.held_out = held_out_texts(
                        config.data,
                        vocab_size=config.model.vocab_size,
                        seq_len=seq_len,
                        rows=rows,
                        most=config.evaluation.eval_steps,
                        sharding=program.batch_sharding,
                        say=say,
                    )
            self._open = opening.pop_all()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        with self.wall.part("save"):  # the last one may still be on its way
            self._open.close()

    def train(self, step: jax.stages.Compiled, console: Console, team: Team) -> Outcome:
        """Run the remaining steps.

        Args:
            step: `program.step`, compiled.
            console: shows the progress.
            team: the processes of the run, which stop after the same step.

        Raises:
            UserError: the checkpoint, or the initial parameters, cannot be read.
            Finding: too many steps in a row were skipped, or the last checkpoint could not be
                saved.
        """
        if self.data is None:
            return Outcome(self.first, None, None)
        self.wall.begin(self.first)
        with self.wall.part("restore" if self.first else "init"):
            state = self._first_state(console)
        train = self.config.train
        writes = jax.process_index() == 0
        writer = MetricsWriter(
            self.folder,
            first_step=self.first,
            tensorboard=train.enable_tensorboard,
            enabled=writes,
            sinks=wandb_sinks(self.config, self.folder, self.say) if writes else (),
            say=self.say,
        )
        progress = ProgressLine(
            console,
            first_step=self.first,
            steps=train.steps,
            log_period=train.log_period,
            bytes_per_token=self.data.bytes_per_token,
        )
        profile = StepProfile(self.folder / "profile", train, first_step=self.first)
        self.profile, self.step = profile, step
        self.bad_steps = BadSteps(self.config, self.program, self.folder, console.print)
        self.records = StepRecords(
            self.config,
            self.program,
            writer=writer,
            progress=progress,
            wall=self.wall,
            bad_steps=self.bad_steps,
        )
        self.evaluation = HeldOutLoss(
            self.config.evaluation,
            self.held_out,
            self.program,
            self.folder,
            first=self.first,
            checkpointer=self.checkpointer,
            say=console.print,
            show=writer.write_evaluation,
        )
        with writer, team.running(self.first), profile, progress, self.wall.part(STEPS):
            updates = self._steps(state, self.data, team)
            if updates == train.steps or self.evaluation.end:
                self.records.write_layers()
            if self.checkpointer:
                self.checkpointer.finish()
            self.evaluation.finish()
        early = updates < train.steps
        ended = self.evaluation.end if early else None
        stopped = team.reason if early and not ended else None
        return Outcome(updates, stopped, self.records.last, ended)

    def _first_state(self, console: Console) -> TrainState:
        if self.checkpointer and self.first:
            console.print(f"continuing from the checkpoint after step {self.first}")
            abstract_state = self.program.abstract_state
            return self.checkpointer.restore(self.first, abstract_state, say=console.print)
        run = self.config.run
        if run.load_parameters_path:
            params = first_params(self.config, self.program.model, console)
            step, opt_state = self.program.init_rest(params)
            # As the optimizer stores them, which may be over more axes than the layers use.
            places = jax.tree.map(lambda leaf: leaf.sharding, self.program.abstract_state.params)
            return TrainState(step, jax.device_put(params, places, donate=True), opt_state)
        with console.status("creating the parameters"):
            key = jax.random.key(self.config.train.seed)
            state: TrainState = jax.block_until_ready(self.program.init(key))
        return state

    def _steps(self, state: TrainState, data: Batches, team: Team) -> int:
        """Run the steps; each is in flight while the previous one is recorded."""
        train = self.config.train
        pending: tuple[int, Metrics, Batch] | None = None
        clock = SaveClock(train.checkpoint_period_minutes)
        ending = False
        owed = False  # a checkpoint that waits for a step that is not skipped
        self.records.start_clock()
        for step in range(self.first, train.steps):
            if self.evaluation.end:
                return step
            if pending and self.bad_steps.next_may_end_the_run:
                self.records.write(*pending, state)
                pending = None
            self.profile.before(step, pending)
            flying = pending[1] if pending else {}
            with self.wall.waiting("data", hidden=partial(in_flight, flying)):
                batch = next(data)
            state, metrics = self.step(state, batch)
            if self.checkpointer:
                self.checkpointer.poll()
            if pending:
                self.records.write(*pending, state)
            pending = step, metrics, batch
            updates = step + 1
            last = updates == train.steps
            stopping = team.reached(updates)
            owed = owed or clock.due(updates) or updates % train.checkpoint_period == 0
            evaluating = self.evaluation.due(updates)
            local = self.config.local.due(updates)
            if stopping or owed or last or evaluating or local:
                # Know what became of the step before saving.
                self.records.write(*pending, state)
                pending = None
                if evaluating:
                    with self.wall.part("evaluate"):
                        owed = self.evaluation.run(state, updates) or owed
                    self.records.start_clock()
                    ending = self.evaluation.end is not None
                # While steps are bad, the weights may be what is wrong: older ones stay the newest.
                due = owed and not self.bad_steps.in_a_row
                completed = last and train.save_checkpoint_on_completion
                if self.checkpointer and (stopping or due or completed or ending):
                    with self.wall.part("save"):
                        self.checkpointer.save(state, updates=updates)
                    clock.saved()
                elif self.checkpointer and local and not self.bad_steps.in_a_row:
                    with self.wall.part("save"):
                        self.checkpointer.save_locally(state, updates=updates)
                owed = owed and not due
            if stopping:
                return updates
        return train.steps


def in_flight(metrics: Metrics) -> bool:
    """Return whether the step that these are of, if any, is still running."""
    arrays: list[Any] = list(metrics.values())  # whose type does not tell of `is_ready`
    return not all(each.is_ready() for each in arrays)
