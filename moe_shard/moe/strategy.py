"""The interface of a dispatch strategy, and how a layer gets the one that its config names.

A strategy is one file in `moe_shard.moe.dispatch`, or one of your own: a class registered with
`moe_shard.config.strategies.register_strategy`, whose instances are called as `Strategy` says.
"""

from __future__ import annotations

from typing import Protocol, cast

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.moe_config import MoEConfig
from moe_shard.config.strategies import find_strategy
from moe_shard.moe.experts import Experts
from moe_shard.moe.placement import Placement
from moe_shard.moe.record import MoERecord
from moe_shard.moe.router import Routing
from moe_shard.sharding.annotate import Sharding


class Strategy(Protocol):
    """A way to bring tokens to their experts and the expert outputs back."""

    def __call__(
        self, x: Float[Array, "B S M"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B S M"], Int[Array, "B"]]:
        """Apply the chosen experts to every token.

        Args:
            x: tokens.
            routing: the router's decision.
            experts: their parameters.

        Returns:
            The weighted sum over each token's experts, summed over k in order and in float32,
            in `x`'s dtype; and how many choices of each sequence were dropped.
        """
        ...

    def record(self, tokens: tuple[int, ...], dtype: DTypeLike) -> MoERecord:
        """Return what a call with such tokens takes, and why not otherwise; nothing is traced.

        Args:
            tokens: [B S M], the shape of the layer's input on all devices together.
            dtype: of the experts' products.
        """
        ...


def make_strategy(config: MoEConfig, placement: Placement) -> Strategy:
    """Make the strategy that `moe_dispatch` names.

    Args:
        config: of the layer.
        placement: of its arrays.

    Raises:
        UserError: no strategy of that name is registered, or it cannot run on these devices.
    """
    return cast(Strategy, find_strategy(config.moe_dispatch).make(config, placement))


def moe_record(
    config: MoEConfig, sharding: Sharding, tokens: tuple[int, ...], dtype: DTypeLike
) -> MoERecord:
    """Return what a layer takes, from configuration, mesh, rules and shapes; nothing is traced.

    Args:
        config: of the layer.
        sharding: the mesh and its rules.
        tokens: [B S M], the shape of the layer's input on all devices together.
        dtype: of the experts' products.

    Raises:
        UserError: as the layer's call.
    """
    placement = Placement(sharding, no_expert_sharding=config.moe_dispatch_no_expert_sharding)
    return make_strategy(config, placement).record(tokens, dtype)
