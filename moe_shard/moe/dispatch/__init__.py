"""Dispatch strategies, with the interface of `base.Strategy`.

Dims, besides those of `moe_shard.moe`:

    T  tokens of a device     N  its choices, T * K     R  rows at their experts
    D  devices of an expert group (the expert axes' size)     L  experts of one device, E / D
"""

from __future__ import annotations

from moe_shard.config.moe_config import MoEConfig
from moe_shard.moe.dispatch import einsum, gather
from moe_shard.moe.dispatch.base import Strategy
from moe_shard.moe.dispatch.by_capacity import ByCapacity
from moe_shard.moe.dispatch.ragged import Ragged
from moe_shard.moe.placement import Placement


def make_strategy(config: MoEConfig, placement: Placement) -> Strategy:
    """The strategy that `moe_dispatch` names.

    Args:
        config: of the layer.
        placement: of its arrays.
    """
    match config.moe_dispatch:
        case "einsum":
            return ByCapacity(einsum, config, placement)
        case "gather":
            return ByCapacity(gather, config, placement)
        case "ragged":
            return Ragged(config, placement)
