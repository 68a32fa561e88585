"""Save checkpoints often to a disk or RAM disk of each machine, beside those of the run's folder.

Orbax's emergency manager writes and reads them, as for MaxText's `enable_emergency_checkpoint`. A
replica is an index of the data axis. Every replica but the first writes what it holds, each process
its part into a folder of its own. To restore, one replica that has all of its parts reads them, and
the others get them through the devices. So they serve the same mesh on the same processes alone;
anything else is restored from the run's folder.

Orbax's local checkpoints carry no checksums. Each process writes those of its part when Orbax has
named it, and at a start compares them; a part without them was not finished.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from jax.experimental.multihost_utils import process_allgather
from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator
from orbax.checkpoint._src.multihost import multihost
from orbax.checkpoint.experimental.emergency import checkpoint_manager as emergency

from moe_shard.checkpoints.checksums import (
    Damage,
    check_sizes,
    check_sums,
    read_manifest,
    write_manifest,
)
from moe_shard.checkpoints.room import (
    free_bytes,
    room_words,
    why_not_writable,
    why_not_written,
)
from moe_shard.checkpoints.whole import said_by_all
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


class LocalCheckpoints:
    """Save and restore the checkpoints of one run on this machine's disk.

    All processes call each method alike.

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
        self._state, self._say = state, say
        self._mesh = _mesh_of(state)
        require_replicas(self._mesh)
        self._id = f"{run}, {_form(state)}"
        self._folder = folder / str(jax.process_index()) / "checkpoints"
        # Orbax wants a folder for checkpoints that all share; those are saved elsewhere.
        shared = self._folder.with_name("none")
        for each in (self._folder, shared):
            try:
                each.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot write local checkpoints to {each}: {error.strerror}\n"
                    "fix: local_checkpoint_directory=FOLDER that you may write to"
                ) from error
        _prepare_orbax()
        self._tell(self._examine(verify=verify))
        self._in_flight: int | None = None
        self._sums: threading.Thread | None = None
        self._failed = ""
        self._manager = emergency.CheckpointManager(
            self._folder,
            shared,
            global_mesh=self._mesh,
            abstract_state=state,
            options=emergency.CheckpointManagerOptions(
                local=emergency.LocalCheckpointOptions(
                    max_to_keep=_KEPT, save_decision_policy=_Save(True)
                ),
                persistent=emergency.PersistentCheckpointOptions(save_decision_policy=_Save(False)),
                replica_axis_index=self._mesh.axis_names.index(_REPLICA_AXIS),
            ),
        )
        self.latest: int | None = self._manager.latest_step()

    def begin(self, updates: int) -> None:
        """Remove what is of later updates than the run goes on from: other replicas lack it."""
        for path in self._parts():
            if int(path.name) > updates:
                shutil.rmtree(path, ignore_errors=True)
        self._manager.reload()

    def restore(self) -> TrainState:
        """Read the newest, each device its own shards.

        Raises:
            UserError: it cannot be read.
        """
        try:
            state = self._manager.restore(self.latest).state
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            raise UserError(
                f"cannot read the local checkpoint {self._folder / str(self.latest)}: "
                f"{why_not_written(error)}\nfix: rename {self._folder}, to continue from the run's"
            ) from error
        places = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        placed: TrainState = jax.device_put(TrainState(*state), places)
        return placed

    def save(self, state: TrainState, *, updates: int) -> None:
        """Save in the background; one that fails is said with the next, on any process."""
        self.finish()
        # Begun by all processes or by none: those of a replica wait for each other.
        if hindered := said_by_all(self._hindrance()):
            process, why = next(iter(hindered.items()))
            self._say(
                f"the local checkpoint after step {updates} was not saved: process {process}: {why}"
            )
            return
        try:
            self._manager.save(updates, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)))
            self._in_flight = updates
        except Exception as error:
            self._fail(updates, error)
        _count_alike()

    def _hindrance(self) -> str:
        """Return why this process cannot write one; empty if it may be able to."""
        free = free_bytes(self._folder)
        newest = max(self._parts(), key=lambda part: int(part.name), default=None)
        with suppress(Damage):
            manifest = read_manifest(newest) if newest else None
            if free is not None and manifest is not None and free < manifest.bytes:
                return f"it cannot fit in {self._folder} ({room_words(free, manifest.bytes)})"
        return why_not_writable(self._folder)

    def poll(self) -> None:
        """Write the checksums when Orbax has named a checkpoint; cheap, for every step."""
        if self._in_flight is None or self._sums is not None:
            return
        if (part := self._folder / str(self._in_flight)).is_dir():
            self._sums = threading.Thread(target=self._write_sums, args=(part, self._in_flight))
            self._sums.start()

    def _write_sums(self, part: Path, updates: int) -> None:
        # Removed meanwhile, or no room: without checksums it does not count.
        with suppress(OSError):
            write_manifest(part, updates=updates, run=self._id)

    def settle(self) -> None:
        """Wait for the save in the background and its checksums."""
        if self._in_flight is None:
            return
        try:
            self._manager.wait_until_finished()
            self.poll()
        except Exception as error:
            self._fail(self._in_flight, error)
        if self._sums is not None:
            self._sums.join()
        self._in_flight = self._sums = None

    def _fail(self, updates: int, error: Exception) -> None:
        self._failed = (
            f"the local checkpoint after step {updates} was not saved in {self._folder}: "
            f"{why_not_written(error)} (the others, and those of the run, are as they were)"
        )
        shutil.rmtree(self._folder / str(updates), ignore_errors=True)
        with suppress(Exception):
            self._manager.reload()

    def finish(self) -> None:
        """Wait until everything is written, and say it of any process where it has failed."""
        self.settle()
        self._tell([self._failed] if self._failed else [])
        self._failed = ""

    def close(self) -> None:
        """Wait until everything is written or has failed, and release what is held."""
        self.settle()
        with suppress(Exception):
            self._manager.close()

    def _tell(self, lines: list[str]) -> None:
        """Say what any process has to say of its own disk."""
        for process, text in said_by_all("; ".join(lines)).items():
            self._say(f"process {process}: {text}")

    def _parts(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.name.isdecimal()]

    def _examine(self, *, verify: bool) -> list[str]:
        """Set aside parts that are damaged, or that this start cannot use; return lines on them."""
        lines = []
        for part in self._parts():
            try:
                manifest = read_manifest(part)
                if manifest is None:
                    shutil.rmtree(part, ignore_errors=True)
                    continue
                if manifest.updates != int(part.name):
                    raise Damage(f"it was saved after step {manifest.updates}")
                check_sizes(part, manifest)
                if verify:
                    check_sums(part, manifest)
                if manifest.run == self._id:
                    continue
                what = "is of another mesh, other processes or another optimizer"
            except Damage as damage:
                what = f"is damaged: {damage}"
            aside = part.with_name(part.name + ASIDE)
            if aside.exists():
                aside = next_numbered(aside)
            part.rename(aside)
            lines.append(f"the local checkpoint {part} {what}; set aside as {aside.name}")
        return lines


def require_replicas(mesh: Any) -> None:
    """Refuse a mesh without two replicas on processes of their own.

    Raises:
        UserError: there are none.
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


def _mesh_of(state: TrainState) -> Any:
    place: Any = state.step.sharding
    return place.mesh


def _form(state: TrainState) -> str:
    """Return what a state's arrays, their places and the processes have to be alike in."""
    mesh = _mesh_of(state)
    leaves = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), str(leaf.sharding.spec))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]
    devices = [(device.process_index, device.id) for device in mesh.devices.flat]
    return hashlib.sha256(repr((dict(mesh.shape), devices, leaves)).encode()).hexdigest()[:16]


def _prepare_orbax() -> None:
    """Do what its emergency manager expects of a program that is started by absl."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    if not multihost.is_runtime_to_distributed_ids_initialized():
        multihost.initialize_runtime_to_distributed_ids()
    if not multihost.is_distributed_to_device_ids_initialized():
        multihost.initialize_distributed_to_device_ids()


def _count_alike() -> None:
    """Count Orbax's operations on all processes as on the one that has counted most.

    Each saved checkpoint counts one, by which processes find each other's signals; those that save
    no local one would be behind at the next checkpoint of all.
    """
    own = int(OperationIdGenerator.get_current_operation_id())
    most = int(np.max(np.asarray(process_allgather(np.int32(own)))))
    for _ in range(own, most):
        OperationIdGenerator.next_operation_id()
