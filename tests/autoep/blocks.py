"""Turn parameters on devices into the blocks that an export reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_shard.autoep.host_blocks import HostBlock, bounds_of_slices, leaves_of


def blocks_of(params: Any) -> Iterator[HostBlock]:
    """Yield each distinct shard of each parameter."""
    for path, array in leaves_of(params):
        shards = {bounds_of_slices(s.index, array.shape): s.data for s in array.global_shards}
        for bounds, values in shards.items():
            yield HostBlock(path, array.shape, bounds, np.asarray(values))
