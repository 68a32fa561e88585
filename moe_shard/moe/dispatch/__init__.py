"""Dispatch strategies, one a file, all with the interface of `base.Strategy`."""

from __future__ import annotations

from moe_shard.moe.dispatch import einsum, gather
from moe_shard.moe.dispatch.base import Strategy

STRATEGIES: dict[str, Strategy] = {"einsum": einsum, "gather": gather}
"""By the name that `moe_dispatch` takes."""
