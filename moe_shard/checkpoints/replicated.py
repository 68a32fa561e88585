"""Save to the machines' own disks for GKE's replicator service, which copies and brings back.

Orbax's replicator manager writes and reads, as for MaxText's `enable_multi_tier_checkpointing`:
every process its own part, on any mesh. The service renames and removes what it has taken, so a
checkpoint is written under another name, and gets its number when it has its checksums. Those
travel with it, also from another machine or the bucket.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint._src.multihost import multihost
from orbax.checkpoint.experimental.emergency.multi_tier_checkpointing import (
    replicator_checkpoint_manager as orbax,
)

from moe_shard.checkpoints.checksums import read_manifest, write_manifest
from moe_shard.checkpoints.local import OTHER_FORM, LocalCheckpoints, mesh_of, why_unusable
from moe_shard.checkpoints.replicator import ERRORS, FAILED, Node, Replicator
from moe_shard.checkpoints.room import why_not_writable, why_not_written
from moe_shard.checkpoints.together import SavesTogether, barriers_of
from moe_shard.checkpoints.whole import said_by_all
from moe_shard.config.local_config import LocalConfig
from moe_shard.data.corpus import Say
from moe_shard.errors import UserError
from moe_shard.program.step import TrainState

_WRITTEN = "written"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class ReplicatedCheckpoints(LocalCheckpoints):
    """Save and restore by GKE's replicator service.

    Args:
        folder: that the service watches on this machine.
        run: names the run.
        job: names it for a person.
        state: shapes, dtypes and shardings of its state.
        config: says how often the service copies to the bucket, and which processes hold the same.
        seconds: how long to wait for the service.
        verify: whether to compare checksums, and not only names and sizes.
        say: receives a line on what the service brings, or on why it cannot be used.

    Raises:
        UserError: the service is not there or gives up, the processes share a folder, or are other
            groups than the configuration says.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        job: str,
        state: TrainState,
        config: LocalConfig,
        *,
        seconds: float,
        verify: bool,
        say: Say,
    ) -> None:
        groups = _groups(state, config.mtc_data_parallelism)
        _require_own_folders(folder)
        super().__init__(folder, run, state, SavesTogether("local"), say=say)
        count = jax.process_count()
        self._service = Replicator(
            folder,
            Node(
                job,
                multihost.runtime_to_distributed_ids()[jax.process_index()],
                count,
                groups,
                config.multi_tier_checkpointing_backup_interval_minutes,
                config.multi_tier_checkpointing_backup_interval_steps,
            ),
        )
        if absent := said_by_all(self._service.ask(seconds)):
            process, why = next(iter(absent.items()))
            raise UserError(
                f"GKE's replicator service does not answer: process {process}: {why}\n"
                "fix: a cluster with the add-on HighScaleCheckpointing and its volume there, or "
                "enable_emergency_checkpoint=true instead"
            )
        same = f"{groups} groups of {count // groups}" if groups > 1 else "no two"
        say(f"GKE's replicator service is there; of {count} processes, {same} hold the same")
        self.latest = self._bring(verify=verify)
        self._bytes = 0
        with barriers_of(self._together):
            self._manager = orbax.ReplicatorCheckpointManager(
                folder,
                orbax.ReplicatorCheckpointManagerOptions(
                    step_name_format=ocp.path.step.standard_name_format(step_prefix=_WRITTEN)
                ),
                global_mesh=mesh_of(state),
            )

    def _bring(self, *, verify: bool) -> int | None:
        """Take the checkpoint that the service brings, if all processes can use theirs."""
        for left in self._folder.glob(f"{_WRITTEN}_*"):  # what it has not removed
            left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)
        link = self._service.wait(self._say)
        updates = self._service.step_of(link) if link else None
        if link is None or updates is None:
            lines = []
        else:
            part = link.rename(self._part(updates))
            lines = self._examine(part, updates, verify=verify)
        steps = {*said_by_all(str(updates)).values()}
        if len(steps) > 1:
            lines.append(
                f"GKE's replicator service brought other steps: {', '.join(sorted(steps))}"
            )
        usable = not self._tell(lines)
        if not usable and updates is not None:
            self._part(updates).unlink()
        return updates if usable else None

    def _examine(self, part: Path, updates: int, *, verify: bool) -> list[str]:
        """Return a line if a part cannot be used; one that is damaged gets another name.

        Without it the service brings the same from elsewhere, at the next start; under its name it
        would also stand for what this run saves of this step again.
        """
        why = why_unusable(part, updates, self._id, verify=verify)
        if not why:
            return []
        line = f"the local checkpoint after step {updates} {why}"
        data = part.resolve()
        if why == OTHER_FORM or data.parent != self._folder.resolve():
            return [line]
        aside = data.with_name(data.name + ".aside")
        data.rename(aside)
        return [f"{line}; set aside as {aside.name}"]

    def begin(self, updates: int) -> None:
        """Drop what the service has brought, if the run goes on from something newer."""
        if self.latest is not None and self.latest != updates:
            self._part(self.latest).unlink()
            self._manager.reload()

    def _read(self) -> Any:
        places = ocp.checkpoint_utils.construct_restore_args(
            self._state, jax.tree.map(lambda leaf: leaf.sharding, self._state)
        )
        wanted = ocp.args.PyTreeRestore(item=self._state, restore_args=places)
        state = self._manager.restore(self.latest, ocp.args.Composite(state=wanted)).state
        self._part(self.latest or 0).unlink()
        return state

    def _part(self, updates: int) -> Path:
        return self._folder / f"{_WRITTEN}_{updates}"

    def _needed(self) -> int:
        return self._bytes

    def poll(self) -> None:
        """Write the checksums of one that is complete, or give up one that has failed."""
        super().poll()
        if (
            self._in_flight is not None
            and not self._manager.is_saving_in_progress()
            and not self._part(self._in_flight).is_dir()
            and self._sums is None
        ):
            self.settle()

    def _hindrance(self) -> str:
        if failed := self._service.complaint(FAILED):
            return f"GKE's replicator service has given up: {failed}"
        if untaken := self._service.untaken():
            return f"GKE's replicator service has not taken the one after step {untaken[0]} yet"
        return super()._hindrance()

    def _write_sums(self, part: Path, updates: int) -> None:
        try:
            write_manifest(part, updates=updates, run=self._id)
            if manifest := read_manifest(part):
                self._bytes = manifest.bytes
            part.rename(self._folder / str(updates))  # from here on it is the service's
        except OSError as error:
            self._failed = (
                f"the local checkpoint after step {updates} was not handed over in "
                f"{self._folder}: {why_not_written(error)}"
            )
            shutil.rmtree(part, ignore_errors=True)

    def finish(self) -> None:
        """Wait until everything is written, and say what has failed here or in the service."""
        super().finish()
        error = self._service.complaint(ERRORS)
        self._tell([f"GKE's replicator service: {error}"] if error else [])


def identical_groups(parts: Sequence[object]) -> int:
    """Return the most groups of consecutive processes of which all hold the same.

    Args:
        parts: what each process holds.
    """
    count = len(parts)
    return next(
        groups
        for groups in range(count, 0, -1)
        if count % groups == 0
        and all(part == parts[i % (count // groups)] for i, part in enumerate(parts))
    )


def held_by(state: Any, process_of: Mapping[int, int], count: int) -> list[object]:
    """Return what each process holds of a state: for every array, the slices of its devices.

    Args:
        state: shapes and shardings of its arrays.
        process_of: a device's id -> its process.
        count: number of processes.
    """
    parts: list[list[object]] = [[] for _ in range(count)]
    seen: dict[Any, list[frozenset[str]]] = {}
    for leaf in jax.tree.leaves(state):
        key = (leaf.sharding, leaf.shape)
        if key not in seen:
            held: list[set[str]] = [set() for _ in range(count)]
            for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
                held[process_of[device.id]].add(repr(index))
            seen[key] = [frozenset(each) for each in held]
        for process, slices in enumerate(seen[key]):
            parts[process].append(slices)
    return [tuple(each) for each in parts]


def _groups(state: TrainState, asked: int) -> int:
    """Return how many groups of processes hold the same.

    Raises:
        UserError: there is one process, or it is not as asked.
    """
    count = jax.process_count()
    if count == 1:
        raise UserError(
            "enable_multi_tier_checkpointing=true is for several processes, one on each machine: "
            "this is one alone\nfix: checkpoint_period_minutes=MINUTES instead"
        )
    if not multihost.is_runtime_to_distributed_ids_initialized():
        multihost.initialize_runtime_to_distributed_ids()
    ranks = multihost.runtime_to_distributed_ids()
    rank_of = {device.id: ranks[device.process_index] for device in jax.devices()}
    found = identical_groups(held_by(state, rank_of, count))
    if asked and (count % asked or found % asked):
        raise UserError(
            f"mtc_data_parallelism={asked}: on this mesh, {found} groups of {count // found} "
            f"processes hold the same, of {count}\nfix: mtc_data_parallelism={found}, or 0, or "
            "data parallelism over the processes"
        )
    return asked or found


def _require_own_folders(folder: Path) -> None:
    """Refuse a folder that is not there, or that two processes share.

    Raises:
        UserError: there is one.
    """
    why = "it is no folder"
    if folder.is_dir():
        why = why_not_writable(folder)
    if hindered := said_by_all(why):
        process, line = next(iter(hindered.items()))
        raise UserError(
            f"process {process}: cannot write local checkpoints to {folder}: {line}\n"
            "fix: local_checkpoint_directory=the folder where GKE mounts the service's volume"
        )
    of = os.stat(folder)
    boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
    folders = said_by_all(f"{boot} {of.st_dev} {of.st_ino}")
    first: dict[str, int] = {}
    for process, place in folders.items():
        if first.setdefault(place, process) != process:
            raise UserError(
                f"processes {first[place]} and {process} share {folder}, of which GKE's replicator "
                "service takes one part\nfix: one process on each machine"
            )
