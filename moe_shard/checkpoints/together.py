"""Let a save fail on all processes when it fails on one.

A process whose disk is full, or whose folder may not be written, never comes to the barriers at
which Orbax's background threads wait for each other, by default for 20 minutes. Here it comes to
them all the same, with a word left in the store of jax's coordination service that it has failed:
each then gives the checkpoint up, before it gets its name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax._src.distributed import global_state
from orbax.checkpoint import checkpoint_manager

_TIMEOUT_MS = 1_200_000
_WRITTEN, _NAMED = "async_write_complete", "async_commit_complete"
"""Orbax's names of its two barriers: all have written; the checkpoint has its name."""


class FailedElsewhere(Exception):
    """Say in one line which process could not write, and why."""


class SavesTogether:
    """Be the barriers of a checkpoint manager's background threads.

    Args:
        manager: names it among those of a run.
        processes: that save together; None for all.
    """

    def __init__(self, manager: str = "saves", processes: set[int] | None = None) -> None:
        self._manager, self._processes = manager, processes
        self._saves = 0  # counts alike on all processes, which save after the same steps
        self._at = _WRITTEN

    def begin(self) -> None:
        """Begin a save."""
        self._saves += 1
        self._at = _WRITTEN

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """Wait for the other processes at one of Orbax's barriers.

        Raises:
            FailedElsewhere: another process has failed in what the barrier completes.
        """
        at = next((name for name in (_WRITTEN, _NAMED) if name in key), None)
        if at is None:
            return  # whether a save is in progress: each process asks for its own
        self._at = at
        self._meet(at, timeout_ms)
        failed: list[tuple[str, str]] = _store().key_value_dir_get(f"{self._name(at)}/failed/")
        if failed:
            process, why = min((int(name.rpartition("/")[2]), why) for name, why in failed)
            raise FailedElsewhere(of_process(process, why))
        self._at = _NAMED

    def tell(self, error: BaseException, why: str) -> None:
        """Tell the others that the save has failed in this process.

        Args:
            error: what has ended it.
            why: a line.
        """
        others = (self._processes or {*range(jax.process_count())}) - {jax.process_index()}
        if not others or isinstance(error, FailedElsewhere):
            return
        at = self._at
        _store().key_value_set(f"{self._name(at)}/failed/{jax.process_index()}", why)
        # The others come there when they have written their part, which may take a while.
        threading.Thread(target=self._come, args=(at,), daemon=True).start()

    def _name(self, at: str) -> str:
        return f"moe_shard/{self._manager}/{self._saves}/{at}"

    def _come(self, at: str) -> None:
        with suppress(jax.errors.JaxRuntimeError):  # the run may have ended meanwhile
            self._meet(at, _TIMEOUT_MS)

    def _meet(self, at: str, timeout_ms: int) -> None:
        meet = ocp.multihost.get_barrier_sync_fn(processes=self._processes)
        meet(key=self._name(at), timeout_ms=timeout_ms)


@contextmanager
def barriers_of(together: SavesTogether) -> Iterator[None]:
    """Give managers that are opened in the block barriers of ours, which their options lack.

    At Orbax's own, the background threads of the others wait 20 minutes for one that has failed.
    """
    made: Callable[..., Any] = checkpoint_manager.CheckpointManagerOptions

    def with_ours(**options: Any) -> Any:
        ours = ocp.AsyncOptions(barrier_sync_fn=together.wait)
        return made(**options | {"async_options": ours})

    checkpoint_manager.CheckpointManagerOptions = with_ours
    try:
        yield
    finally:
        checkpoint_manager.CheckpointManagerOptions = made


def of_process(process: int, why: str) -> str:
    """Say which process could not write, and why."""
    return f"process {process} could not write it: {why}"


def _store() -> Any:
    return global_state.client
