"""Save checkpoints often to a disk or RAM disk of each machine, beside those of the run's folder.

Orbax's managers write and read them (`emergency.py`, `replicated.py`), and have no checksums: each
process writes those of its part when Orbax has named it, and at a start compares them.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from abc import ABC, abstractmethod
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

from moe_shard.checkpoints.checksums import (
    Damage,
    check_sizes,
    check_sums,
    read_manifest,
    write_manifest,
)
from moe_shard.checkpoints.place import UNFINISHED
from moe_shard.checkpoints.room import (
    free_bytes,
    room_words,
    why_not_writable,
    why_not_written,
)
from moe_shard.checkpoints.together import FailedElsewhere, SavesTogether
from moe_shard.checkpoints.whole import said_by_all
from moe_shard.data.corpus import Say
from moe_shard.errors import UserError
from moe_shard.program.step import TrainState

OTHER_FORM = "is of another mesh, other processes or another optimizer"
"""Why a part that is whole cannot be used."""


class LocalCheckpoints(ABC):
    """Save and restore the checkpoints of one run on this machine's disk.

    All processes call each method alike.

    Attributes:
        latest: updates of the newest that can be restored; None if there is none.

    Args:
        folder: where this process saves.
        run: names the run.
        state: shapes, dtypes and shardings of its state.
        together: the processes that write parts of the same.
        say: receives a line on each that is damaged or cannot be used.
    """

    latest: int | None = None
    _manager: Any  # of Orbax; its two kinds share no class

    def __init__(
        self, folder: Path, run: str, state: TrainState, together: SavesTogether, *, say: Say
    ) -> None:
        self._folder, self._state, self._together, self._say = folder, state, together, say
        self._id = f"{run}, {_form(state)}"
        self._in_flight: int | None = None
        self._sums: threading.Thread | None = None
        self._failed = ""
        _prepare_orbax()

    @abstractmethod
    def begin(self, updates: int) -> None:
        """Remove what is of no use to a run that goes on from a number of updates."""

    def restore(self) -> TrainState:
        """Read the newest, each device its own shards.

        Raises:
            UserError: it cannot be read.
        """
        try:
            state = self._read()
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            raise UserError(
                f"cannot read the local checkpoint {self._part(self.latest or 0)}: "
                f"{why_not_written(error)}\nfix: rename {self._folder}, to continue from the run's"
            ) from error
        places = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        placed: TrainState = jax.device_put(TrainState(*state), places)
        return placed

    @abstractmethod
    def _read(self) -> Any:
        """Read the newest by Orbax's manager."""

    def save(self, state: TrainState, *, updates: int) -> None:
        """Save in the background; one that fails on a process is given up by those with parts.

        It is said with the next.
        """
        self.finish()
        self._together.begin()
        # Begun by all processes or by none: they wait for each other.
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
        self._remove_unfinished()
        free, needed = free_bytes(self._folder), self._needed()
        if free is not None and free < needed:
            return f"it cannot fit in {self._folder} ({room_words(free, needed)})"
        return why_not_writable(self._folder)

    @abstractmethod
    def _needed(self) -> int:
        """Return the bytes that the one before took; 0 if unknown."""

    @abstractmethod
    def _part(self, updates: int) -> Path:
        """Return where Orbax writes this process's part."""

    def poll(self) -> None:
        """Write the checksums when Orbax has named a checkpoint; cheap, for every step."""
        self._begin_sums()

    def _begin_sums(self) -> None:
        if self._in_flight is None or self._sums is not None:
            return
        if (part := self._part(self._in_flight)).is_dir():
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
            self._begin_sums()
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
        shutil.rmtree(self._part(updates), ignore_errors=True)
        with suppress(Exception):
            self._manager.reload()
        self._together.tell(error, why_not_written(error))
        if isinstance(error, FailedElsewhere):
            self._failed = ""  # the other says it

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
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Remove what one that has failed has left; none is being saved."""
        for left in self._folder.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _tell(self, lines: list[str]) -> bool:
        """Say what any process has to say of its own disk; return whether one had something."""
        said = said_by_all("; ".join(lines))
        for process, text in said.items():
            self._say(f"process {process}: {text}")
        return bool(said)


def why_unusable(part: Path, updates: int, run: str, *, verify: bool) -> str:
    """Return why a part of a local checkpoint cannot be restored; empty if it can.

    Args:
        part: its folder.
        updates: the number under which it is kept.
        run: names the run, the form of its state and its processes.
        verify: whether to compare checksums, and not only names and sizes.

    Returns:
        A verb and what follows it: `OTHER_FORM`, or what is damaged.
    """
    try:
        manifest = read_manifest(part)
        if manifest is None:
            raise Damage("it has no checksums")
        if manifest.updates != updates:
            raise Damage(f"it was saved after step {manifest.updates}")
        check_sizes(part, manifest)
        if verify:
            check_sums(part, manifest)
    except Damage as damage:
        return f"is damaged: {damage}"
    return "" if manifest.run == run else OTHER_FORM


def mesh_of(state: TrainState) -> Any:
    """Return the mesh that a state is on."""
    place: Any = state.step.sharding
    return place.mesh


def _form(state: TrainState) -> str:
    """Return what a state's arrays, their places and the processes have to be alike in."""
    mesh = mesh_of(state)
    leaves = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), str(leaf.sharding.spec))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]
    devices = [(device.process_index, device.id) for device in mesh.devices.flat]
    return hashlib.sha256(repr((dict(mesh.shape), devices, leaves)).encode()).hexdigest()[:16]


def _prepare_orbax() -> None:
    """Do what its managers of local checkpoints expect of a program that is started by absl."""
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
