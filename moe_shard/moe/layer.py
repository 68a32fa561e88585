"""The MoE layer: route; dispatch, exchange, experts, exchange, combine by a strategy.

Experts that every token passes are added beside.

The named scopes `router`, `dispatch`, `experts` and `combine` are what the HLO tools attribute
collectives by.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.model_config import GatingConfig
from moe_shard.config.moe_config import MoEConfig
from moe_shard.layers.mlp import MLP
from moe_shard.moe.dispatch import make_strategy
from moe_shard.moe.experts import Experts
from moe_shard.moe.losses import expert_counts, router_z_loss
from moe_shard.moe.placement import Placement
from moe_shard.moe.router import Router, Routing
from moe_shard.sharding.annotate import Sharding


class MoEStats(NamedTuple):
    """What the layer tells of each batch row; unreduced, so that it costs no collective here.

    Attributes:
        mean_probs: the router's scores, summing to 1, as means over the row's tokens.
        router_z_loss: see `losses.router_z_loss`; not yet weighted.
        expert_counts: choices of each expert, before drops.
        dropped: choices that found no slot.
    """

    mean_probs: Float[Array, "B E"]
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
        sharding: the mesh and its rules.
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
        sharding: Sharding,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.placement = Placement(
            sharding, no_expert_sharding=config.moe_dispatch_no_expert_sharding
        )
        self.router = Router(
            model_dim=model_dim,
            num_experts=config.num_experts,
            k=config.num_experts_per_tok,
            config=config.router,
            rngs=rngs,
        )
        self.experts = Experts(
            num_experts=config.num_experts,
            model_dim=model_dim,
            hidden_dim=config.moe_mlp_dim,
            gating=gating,
            fused=config.prefuse_moe_weights,
            dtype=dtype,
            weight_dtype=weight_dtype,
            rngs=rngs,
        )
        self.shared = (
            MLP(
                model_dim=model_dim,
                hidden_dim=config.shared_dim,
                gating=gating,
                dtype=dtype,
                weight_dtype=weight_dtype,
                sharding=sharding,
                rngs=rngs,
            )
            if config.shared_dim
            else None
        )
        self.shared_gate = (
            _shared_gate(model_dim, weight_dtype, rngs) if config.shared_expert_gate else None
        )
        self.strategy = make_strategy(config, self.placement)

    def __call__(self, x: Float[Array, "B S M"]) -> tuple[Float[Array, "B S M"], MoEStats]:
        """Apply the layer.

        Returns:
            The weighted sum of the experts' outputs, in `x`'s dtype, and the rows' statistics.
        """
        shared = self._of_shared(x)
        x = self.placement.tokens(x)
        routing = self.route(x)
        y, dropped = self.strategy(x, routing, self.experts)
        with jax.named_scope("router"):
            stats = MoEStats(
                jnp.mean(routing.probs, axis=1),
                router_z_loss(routing.logits),
                expert_counts(routing.indices, self.config.num_experts),
                dropped,
            )
        y = self.placement.tokens(y)
        return y if shared is None else y + shared, stats

    def route(self, x: Float[Array, "B S M"]) -> Routing:
        """What the router decides for every token."""
        with jax.named_scope("router"):
            return self.router(x)

    def _of_shared(self, x: Float[Array, "B S M"]) -> Float[Array, "B S M"] | None:
        """What the experts that every token passes add; None where there are none."""
        if self.shared is None:
            return None
        y = self.shared(x)
        if self.shared_gate is None:
            return y
        with jax.named_scope("mlp"):
            gate = self.shared_gate[...].astype(x.dtype)
            share = jax.nn.sigmoid(jnp.einsum("bsm,m->bs", x, gate))
            return share[..., None] * y


def _shared_gate(model_dim: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param[Array]:
    init = jax.nn.initializers.normal(stddev=model_dim**-0.5)
    return nnx.Param(init(rngs.params(), (model_dim,), dtype), logical_axes=("embed_router",))
