"""Save to the run's folder, and more often to each machine's own disk where that is asked for."""

from __future__ import annotations

from pathlib import Path

from moe_shard.checkpoints.checkpoint import Checkpointer
from moe_shard.checkpoints.emergency import EmergencyCheckpoints
from moe_shard.checkpoints.local import LocalCheckpoints
from moe_shard.checkpoints.replicated import ReplicatedCheckpoints
from moe_shard.config.schema import Config
from moe_shard.data.corpus import Say
from moe_shard.files import expanded
from moe_shard.program.step import TrainState


def open_checkpoints(
    folder: Path, config: Config, state: TrainState, *, say: Say = lambda _: None
) -> Checkpointer:
    """Open the checkpoints of a run, and those of this machine where the configuration has any.

    Args:
        folder: the run's `checkpoints/`.
        config: states which there are.
        state: shapes, dtypes and shardings of the run's state.
        say: see `Checkpointer`.

    Raises:
        UserError: see `Checkpointer`, `EmergencyCheckpoints` and `ReplicatedCheckpoints`.
    """
    if not config.local.key:
        return Checkpointer(folder, config, say=say)
    return _Tiers(folder, config, state, say=say)


class _Tiers(Checkpointer):
    """Save to both; go on from the newest of either, the run's where they are of the same step.

    One save of either kind is finished before one of the other begins: Orbax's processes find each
    other by a count of its operations.
    """

    def __init__(self, folder: Path, config: Config, state: TrainState, *, say: Say) -> None:
        super().__init__(folder, config, say=say)
        name = self.lasting_name()
        self._local = _open_local(config, name, state, say)
        newest, here = super().first(), self._local.latest or 0
        self._from_local = here if here > newest else None
        self._local.begin(max(newest, here))

    def first(self) -> int:
        return self._from_local or super().first()

    def check_fits(self, updates: int) -> None:
        if updates != self._from_local:  # which has been compared already
            super().check_fits(updates)

    def restore(
        self, updates: int, abstract_state: TrainState, *, say: Say = lambda _: None
    ) -> TrainState:
        if updates != self._from_local:
            return super().restore(updates, abstract_state, say=say)
        say(f"the checkpoint after step {updates} is read from the machines' own disks")
        return self._local.restore()

    def save(self, state: TrainState, *, updates: int) -> None:
        self._local.settle()
        super().save(state, updates=updates)

    def save_locally(self, state: TrainState, *, updates: int) -> None:
        self.settle()
        self._local.save(state, updates=updates)

    def poll(self) -> None:
        super().poll()
        self._local.poll()

    def finish(self) -> None:
        self._local.finish()
        super().finish()

    def close(self) -> None:
        self._local.close()
        super().close()


def _open_local(config: Config, name: str, state: TrainState, say: Say) -> LocalCheckpoints:
    folder = expanded(config.local.local_checkpoint_directory).resolve()
    job = f"{config.run.run_name}-{name[:8]}"
    verify = config.train.verify_checkpoints
    if config.local.enable_emergency_checkpoint:
        return EmergencyCheckpoints(folder / job, name, state, verify=verify, say=say)
    seconds = config.run.jax_distributed_initialization_timeout
    return ReplicatedCheckpoints(
        folder, name, job, state, config.local, seconds=seconds, verify=verify, say=say
    )
