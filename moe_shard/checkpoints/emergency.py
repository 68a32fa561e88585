"""Save to the machines' own disks so that replicas of a run bring each other back.

Orbax's emergency manager writes and reads, as for MaxText's `enable_emergency_checkpoint`. A
replica is an index of the data axis. Every replica but the first writes what it holds, each process
its part into a folder of its own. To restore, one replica that has all of its parts reads them, and
the others get them through the devices. So they serve the same mesh on the same processes alone;
anything else is restored from the run's folder. A part without checksums was not finished.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental.emergency import checkpoint_manager as emergency

from moe_shard.checkpoints.checksums import CHECKSUMS, Damage, read_manifest
from moe_shard.checkpoints.local import LocalCheckpoints, mesh_of, why_unusable
from moe_shard.checkpoints.together import SavesTogether, barriers_of
from moe_shard.data.corpus import Say
from moe_shard.errors import UserError
from moe_shard.files import next_numbered
from moe_shard.program.step import TrainState

ASIDE = ".aside"
_REPLICA_AXIS = "data"
_KEPT = 2  # while the checksums of the newest are not written yet, the one before it counts


class _Save:
    """Decide, as Orbax asks, whether a checkpoint is saved: always or never."""

    def __init__(self, always: bool) -> None:
        self._always = always

    def should_save(self, *_: object, **__: object) -> bool:
        return self._always


class EmergencyCheckpoints(LocalCheckpoints):
    """Save and restore by replicas of the data axis.

    Args:
        folder: the run's on this machine.
        run: names the run.
        state: shapes, dtypes and shardings of its state.
        verify: whether to compare checksums, and not only names and sizes.
        say: receives a line on each that is damaged or cannot be used.

    Raises:
        UserError: the mesh has no replicas on processes of their own, or the folder cannot be
            written.
    """

    def __init__(
        self, folder: Path, run: str, state: TrainState, *, verify: bool, say: Say
    ) -> None:
        mesh = mesh_of(state)
        replica, processes = own_replica(mesh)
        own = folder / str(jax.process_index()) / "checkpoints"
        # Orbax wants a folder for checkpoints that all share; those are saved elsewhere.
        shared = own.with_name("none")
        for each in (own, shared):
            try:
                each.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot write local checkpoints to {each}: {error.strerror}\n"
                    "fix: local_checkpoint_directory=FOLDER that you may write to"
                ) from error
        together = SavesTogether(f"local of replica {replica}", processes)
        super().__init__(own, run, state, together, say=say)
        self._tell(self._examine(verify=verify))
        with barriers_of(together):
            self._manager = self._open(mesh, shared)
        self.latest = self._manager.latest_step()

    def _open(self, mesh: Any, shared: Path) -> Any:
        return emergency.CheckpointManager(
            self._folder,
            shared,
            global_mesh=mesh,
            abstract_state=self._state,
            options=emergency.CheckpointManagerOptions(
                local=emergency.LocalCheckpointOptions(
                    max_to_keep=_KEPT, save_decision_policy=_Save(True)
                ),
                persistent=emergency.PersistentCheckpointOptions(save_decision_policy=_Save(False)),
                replica_axis_index=mesh.axis_names.index(_REPLICA_AXIS),
            ),
        )

    def begin(self, updates: int) -> None:
        """Remove what is of later updates than the run goes on from: other replicas lack it."""
        for path in self._parts():
            if int(path.name) > updates:
                shutil.rmtree(path, ignore_errors=True)
        self._manager.reload()

    def _read(self) -> Any:
        return self._manager.restore(self.latest).state

    def _part(self, updates: int) -> Path:
        return self._folder / str(updates)

    def _needed(self) -> int:
        newest = max(self._parts(), key=lambda part: int(part.name), default=None)
        with suppress(Damage):
            if newest and (manifest := read_manifest(newest)):
                return manifest.bytes
        return 0

    def _parts(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.name.isdecimal()]

    def _examine(self, *, verify: bool) -> list[str]:
        """Set aside parts that are damaged, or that this start cannot use; return lines on them."""
        lines = []
        for part in self._parts():
            if not (part / CHECKSUMS).is_file():
                shutil.rmtree(part, ignore_errors=True)
                continue
            why = why_unusable(part, int(part.name), self._id, verify=verify)
            if not why:
                continue
            aside = part.with_name(part.name + ASIDE)
            if aside.exists():
                aside = next_numbered(aside)
            part.rename(aside)
            lines.append(f"the local checkpoint {part} {why}; set aside as {aside.name}")
        return lines


def own_replica(mesh: Any) -> tuple[int, set[int]]:
    """Return which replica this process is of, and the processes of that replica.

    Raises:
        UserError: the mesh has no two replicas on processes of their own.
    """
    at = mesh.axis_names.index(_REPLICA_AXIS)
    replicas = [
        {device.process_index for device in replica.flat}
        for replica in np.moveaxis(mesh.devices, at, 0)
    ]
    count = sum(map(len, replicas))
    if len(replicas) < 2 or len(set.union(*replicas)) < count:
        raise UserError(
            "enable_emergency_checkpoint=true needs replicas, indices of the data axis, on "
            f"processes of their own: there are {len(replicas)} on {jax.process_count()}\n"
            "fix: data parallelism over the processes, or checkpoint_period_minutes=MINUTES"
        )
    return next(
        (number, processes)
        for number, processes in enumerate(replicas)
        if jax.process_index() in processes
    )
