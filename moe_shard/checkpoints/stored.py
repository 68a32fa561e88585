"""Read the parameters of a checkpoint a chunk at a time, as they are stored on disk.

Orbax restores whole arrays onto devices. Copying them elsewhere needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from moe_shard.autoep.host_blocks import HostBlock, ParamPath, leaves_of
from moe_shard.checkpoints.convert import apart
from moe_shard.checkpoints.reading import reading
from moe_shard.checkpoints.stored_arrays import chunk_bounds, open_array, read_chunk
from moe_shard.checkpoints.whole import find_whole
from moe_shard.errors import UserError


@dataclass(frozen=True)
class Stored:
    """Hold the parameters of a checkpoint as they lie on disk.

    Attributes:
        checkpoint: its folder.
        leaves: Orbax's metadata of each parameter, by path.
    """

    checkpoint: Path
    leaves: Mapping[ParamPath, Any]

    @property
    def paths(self) -> frozenset[ParamPath]:
        """Return the paths of the parameters."""
        return frozenset(self.leaves)

    def blocks(self) -> Iterator[HostBlock]:
        """Yield the parameters chunk by chunk, with the experts' gate and up separate.

        Raises:
            UserError: a chunk cannot be read.
        """
        for path, leaf in self.leaves.items():
            with reading(self.checkpoint):
                store = open_array(leaf)
            for bounds in chunk_bounds(leaf):
                with reading(self.checkpoint):
                    block = HostBlock(path, tuple(leaf.shape), bounds, read_chunk(store, bounds))
                parts = apart(block)
                del block  # it is large
                yield from parts


def open_stored(folder: Path, *, say: Callable[[str], object] = lambda _: None) -> Stored:
    """Open the newest parameters of a folder.

    Args:
        folder: `checkpoints/` of a run, or `params/` of an imported model; it is only read.
        say: receives a line on which checkpoint is read.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    found = find_whole(folder, say=say)
    if found is None:
        raise UserError(f"{folder} holds no whole checkpoint\nfix: train until it saves one")
    checkpoint = folder / str(found.updates)
    with reading(checkpoint):
        params = ocp.PyTreeCheckpointHandler().metadata(checkpoint / "state").tree["params"]
    say(f"after step {found.updates} of {folder.parent}")
    return Stored(checkpoint, dict(leaves_of(params)))
