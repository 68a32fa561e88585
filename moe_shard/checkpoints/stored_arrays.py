"""Read the arrays of a checkpoint a chunk at a time with tensorstore, as Orbax does.

Each array is a zarr in the checkpoint's OCDBT store, and its chunks are the shards of the run that
saved it. Nothing is placed on a device, and no other process takes part.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from moe_shard.autoep.host_blocks import Bounds
from moe_shard.checkpoints.bucket import is_address


def open_array(leaf: Any) -> Any:
    """Open an array, given what Orbax's metadata says of it."""
    where = str(leaf.directory)
    base = f"{where}/" if is_address(where) else f"file://{where}/"
    store = {"driver": "ocdbt", "base": base, "path": f"{leaf.name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()


def read_chunk(store: Any, bounds: Bounds) -> np.ndarray:
    """Read the part of an array within bounds."""
    values: np.ndarray = store[tuple(slice(*bound) for bound in bounds)].read().result()
    return values


def chunk_bounds(leaf: Any) -> Iterator[Bounds]:
    """Yield the bounds of an array's chunks."""
    each = leaf.storage.chunk_shape
    along = (
        [(low, min(low + step, size)) for low in range(0, size, max(step, 1))]
        for size, step in zip(leaf.shape, each, strict=True)
    )
    return itertools.product(*along)


def read_all(checkpoint: Path) -> None:
    """Read every array of a checkpoint without keeping any: damage that can be seen raises.

    Raises:
        Exception: whatever Orbax or tensorstore raises for what they cannot read.
    """
    if (config := checkpoint / "config").is_dir():
        json.loads((config / "metadata").read_bytes())
    tree = ocp.PyTreeCheckpointHandler().metadata(checkpoint / "state").tree
    for leaf in jax.tree.leaves(tree):
        store = open_array(leaf)
        for bounds in chunk_bounds(leaf):
            read_chunk(store, bounds)
