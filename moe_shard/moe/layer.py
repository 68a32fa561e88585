"""The MoE layer: route; dispatch, exchange, experts, exchange, combine by a strategy.

The named scopes `router`, `dispatch`, `experts` and `combine` are what the HLO tools attribute
collectives by.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.model import GatingConfig
from moe_shard.config.moe import MoEConfig, RouterConfig
from moe_shard.moe.dispatch import make_strategy
from moe_shard.moe.experts import Experts
from moe_shard.moe.losses import expert_counts, load_balance_loss, router_z_loss
from moe_shard.moe.placement import Placement
from moe_shard.moe.router import Choice, Router
from moe_shard.sharding.annotate import Annotator


class MoEStats(NamedTuple):
    """What the layer tells of each batch row; unreduced, so that it costs no collective here.

    Attributes:
        load_balance_loss: see `losses.load_balance_loss`; not yet weighted.
        router_z_loss: see `losses.router_z_loss`; not yet weighted.
        expert_counts: choices of each expert, before drops.
        dropped: choices that found no slot.
    """

    load_balance_loss: Float[Array, "B"]
    router_z_loss: Float[Array, "B"]
    expert_counts: Int[Array, "B E"]
    dropped: Int[Array, "B"]


class MoELayer(nnx.Module):
    """A routed mixture of gated MLPs.

    Args:
        config: experts, capacity, strategy, the flag.
        model_dim: M.
        gating: the experts' activation, clamps, offset, biases.
        dtype: of the experts' products and the layer's output.
        weight_dtype: of the experts' parameters; the router is always float32.
        annotate: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        *,
        config: MoEConfig,
        model_dim: int,
        gating: GatingConfig,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        annotate: Annotator,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.placement = Placement(annotate, no_expert_sharding=config.no_expert_sharding)
        self.router = Router(
            model_dim=model_dim,
            num_experts=config.num_experts,
            k=config.num_experts_per_tok,
            renormalise=config.router.norm_topk_prob,
            choice=_choice(config.router),
            rngs=rngs,
        )
        self.experts = Experts(
            num_experts=config.num_experts,
            model_dim=model_dim,
            hidden_dim=config.mlp_dim,
            gating=gating,
            fused=config.prefuse_weights,
            dtype=dtype,
            weight_dtype=weight_dtype,
            rngs=rngs,
        )
        self.strategy = make_strategy(config, self.placement)

    def __call__(self, x: Float[Array, "B S M"]) -> tuple[Float[Array, "B S M"], MoEStats]:
        """Apply the layer.

        Returns:
            The weighted sum of the experts' outputs, in `x`'s dtype, and the rows' statistics.
        """
        x = self.placement.tokens(x)
        with jax.named_scope("router"):
            routing = self.router(x)
        y, dropped = self.strategy(x, routing, self.experts)
        with jax.named_scope("router"):
            stats = MoEStats(
                load_balance_loss(
                    routing.probs, routing.indices, self.config.load_balance_loss_type
                ),
                router_z_loss(routing.logits),
                expert_counts(routing.indices, self.config.num_experts),
                dropped,
            )
        return self.placement.tokens(y), stats


def _choice(config: RouterConfig) -> Choice:
    if config.force_load_balance:
        return "round_robin"
    return "random" if config.random else "learned"
