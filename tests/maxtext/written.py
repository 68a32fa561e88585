"""Write checkpoints with MaxText's names and shapes by Orbax, without MaxText.

`recorded.json` has the names and shapes that MaxText wrote; `make test-maxtext` compares it with
what it writes today.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

RECORDED: dict[str, dict[str, list[int]]] = json.loads(
    (Path(__file__).parent / "recorded.json").read_text(encoding="utf-8")
)

Tree = dict[str, np.ndarray]
"""Path in a checkpoint -> array."""


def tree_of(name: str, seed: int = 0) -> Tree:
    """Draw random arrays in the shapes of a recorded checkpoint."""
    random = np.random.default_rng(seed)

    def array(path: str, shape: list[int]) -> np.ndarray:
        if path == "step" or "/count" in path:
            return np.full(shape, 7, np.int32)
        return random.standard_normal(shape).astype(np.float32)

    return {path: array(path, shape) for path, shape in RECORDED[name].items()}


def write(folder: Path, tree: Tree, *, zarr3: bool = True, ocdbt: bool = True) -> Path:
    """Write a checkpoint of one step.

    Args:
        folder: the folder in which `0/items/` is written.
        tree: the arrays.
        zarr3: as MaxText's checkpoint_storage_use_zarr3.
        ocdbt: as MaxText's checkpoint_storage_use_ocdbt.

    Returns:
        `0/items/`.
    """
    nested: dict[str, Any] = {}
    for path, array in tree.items():
        *outer, last = path.split("/")
        node = nested
        for part in outer:
            node = node.setdefault(part, {})
        node[last] = array
    items = folder / "0" / "items"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)) as writer:
        writer.save(items, args=ocp.args.PyTreeSave(nested))
    return items
