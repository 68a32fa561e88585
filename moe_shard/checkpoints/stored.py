"""Read the parameters of a checkpoint a chunk at a time, as they are stored on disk.

Orbax restores whole arrays onto devices. Copying them elsewhere needs neither: each array is a zarr
in the checkpoint's OCDBT store, and its chunks are the shards of the run that saved it. tensorstore
reads them, as it does for Orbax.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from moe_shard.autoep.host_blocks import Bounds, HostBlock, leaves_of
from moe_shard.checkpoints.checkpoint import reading
from moe_shard.checkpoints.convert import apart
from moe_shard.errors import UserError


def stored_blocks(
    folder: Path, *, say: Callable[[str], object] = lambda _: None
) -> Iterator[HostBlock]:
    """Yield the newest parameters of a folder, with the experts' gate and up separate.

    Args:
        folder: `checkpoints/` of a run, or `params/` of an imported model; it is only read.
        say: receives a line on which checkpoint is read.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    with ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(read_only=True),
        item_handlers={"state": ocp.PyTreeCheckpointHandler()},
    ) as manager:
        newest = manager.latest_step()
        if newest is None:
            raise UserError(f"{folder} holds no whole checkpoint\nfix: train until it saves one")
        with reading(folder / str(newest)):
            params = manager.metadata(newest).item_metadata["state"]["params"]
    say(f"after step {newest} of {folder.parent}")
    for path, leaf in leaves_of(params):
        with reading(folder / str(newest)):
            store = _open(leaf)
        for bounds in _chunks(leaf):
            with reading(folder / str(newest)):
                block = HostBlock(path, tuple(leaf.shape), bounds, _read(store, bounds))
            parts = apart(block)
            del block  # it is large
            yield from parts


def _open(leaf: Any) -> Any:
    store = {"driver": "ocdbt", "base": f"file://{leaf.directory}/", "path": f"{leaf.name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()


def _read(store: Any, bounds: Bounds) -> np.ndarray:
    values: np.ndarray = store[tuple(slice(*bound) for bound in bounds)].read().result()
    return values


def _chunks(leaf: Any) -> Iterator[Bounds]:
    """Yield the bounds of an array's chunks."""
    each = leaf.storage.chunk_shape
    along = (
        [(low, min(low + step, size)) for low in range(0, size, max(step, 1))]
        for size, step in zip(leaf.shape, each, strict=True)
    )
    return itertools.product(*along)
