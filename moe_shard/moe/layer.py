"""Build the MoE layer: route; then dispatch, exchange, experts, exchange, combine by a strategy.

Where experts work on a latent, tokens are projected to it before dispatch and back after combine.
The output of shared experts, which process every token, is added to the sum. Reports label
collectives by the named scopes `router`, `dispatch`, `experts` and `combine`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.model_config import GatingConfig
from moe_shard.config.moe_config import MoEConfig
from moe_shard.layers.mlp import MLP
from moe_shard.layers.norm import RMSNorm
from moe_shard.moe.axes import SHARED_GATE
from moe_shard.moe.experts import Experts
from moe_shard.moe.latent import Latent
from moe_shard.moe.losses import expert_counts, mean_over_tokens, router_z_loss
from moe_shard.moe.placement import Placement
from moe_shard.moe.record import MoERecord
from moe_shard.moe.router import Router, Routing
from moe_shard.moe.strategy import Strategy, checked_results, make_strategy
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.parameter import parameter


class MoEStats(NamedTuple):
    """Hold statistics of each sequence; unreduced, so that they cost no collective here.

    Padding counts nowhere.

    Attributes:
        mean_probs: the router's scores, summing to 1, averaged over the sequence's tokens.
        router_z_loss: see `losses.router_z_loss`; not yet weighted.
        expert_counts: number of choices of each expert, before drops.
        dropped: number of choices beyond the capacity.
        tokens: number of tokens that are not padding; None where the layer was not told of any.
    """

    mean_probs: Float[Array, "B E"]
    router_z_loss: Float[Array, "B"]
    expert_counts: Int[Array, "B E"]
    dropped: Int[Array, "B"]
    tokens: Int[Array, "B"] | None = None


class MoELayer(nnx.Module):
    """Apply a routed mixture of MLPs, in place of a dense MLP.

    >>> import jax, jax.numpy as jnp, moe_shard as ms
    >>> from flax import nnx
    >>> sharding = ms.Sharding(ms.make_mesh(data=2, expert=4), ms.RuleTable.default())
    >>> config = ms.MoEConfig(num_experts=8, num_experts_per_tok=2, moe_mlp_dim=64,
    ...                       moe_dispatch_no_expert_sharding=True)  # tokens move, not weights
    >>> layer = ms.init_sharded(
    ...     lambda rngs: ms.MoELayer(config, model_dim=32, sharding=sharding, rngs=rngs),
    ...     rngs=nnx.Rngs(0),
    ... )
    >>> y, stats = jax.jit(layer)(jnp.ones((8, 16, 32)))  # [B S M]
    >>> y.shape, y.sharding.spec
    ((8, 16, 32), P(('data', 'expert'),))
    >>> int(stats.expert_counts.sum()) == 8 * 16 * 2
    True

    Inputs may have any layout; the layer reshards them as the table places `[B S M]`
    (`activation_batch_moe`, `activation_length_moe`, `activation_embed_moe`), as it does its
    outputs. Where the mesh has Explicit axes, the body runs under `jax.sharding.auto_axes`, and
    outputs have these placements in their types. Parameters keep the logical axes of their dims in
    `out_sharding`, see `init_sharded`.

    Args:
        config: experts, capacity, strategy, the flag.
        model_dim: M, the model dim.
        sharding: the mesh and its rules.
        rngs: source of the initial weights (the stream `params`).
        gating: the experts' activation, gate, clamps, offset and biases.
        dtype: dtype of the experts' products and the layer's output.
        weight_dtype: dtype of the experts' parameters; the router is always float32.
        norm_epsilon: number added to mean squares, where the layer normalises.
        zero_centered: whether its norms multiply by 1 + scale.

    Raises:
        UserError: the strategy cannot run on this mesh.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        model_dim: int,
        sharding: Sharding,
        rngs: nnx.Rngs,
        gating: GatingConfig = GatingConfig(),  # noqa: B008  (frozen)
        dtype: DTypeLike = jnp.float32,
        weight_dtype: DTypeLike = jnp.float32,
        norm_epsilon: float = 1e-6,
        zero_centered: bool = False,
    ) -> None:
        self.config = config
        self.sharding = sharding
        self.router = Router(
            model_dim=model_dim,
            num_experts=config.num_experts,
            k=config.num_experts_per_tok,
            config=config.router,
            rngs=rngs,
            norm_epsilon=norm_epsilon,
        )
        self.experts = Experts(
            num_experts=config.num_experts,
            model_dim=config.expert_dim(model_dim),
            hidden_dim=config.moe_mlp_dim,
            gating=gating,
            fused=config.prefuse_moe_weights and gating.has_gate,
            dtype=dtype,
            weight_dtype=weight_dtype,
            rngs=rngs,
        )
        self.latent = (
            Latent(
                model_dim=model_dim,
                latent_dim=config.moe_latent_dim,
                dtype=dtype,
                weight_dtype=weight_dtype,
                sharding=sharding,
                rngs=rngs,
            )
            if config.moe_latent_dim != -1
            else None
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

        def norm() -> RMSNorm:
            return RMSNorm(
                dim=model_dim,
                epsilon=norm_epsilon,
                weight_dtype=weight_dtype,
                zero_centered=zero_centered,
            )

        self.routed_norm = norm() if config.routed_norms else None
        self.routed_out_norm = norm() if config.routed_norms else None
        self.shared_out_norm = norm() if config.routed_norms and self.shared is not None else None
        _ = self.strategy  # raises its errors here rather than during tracing

    @property
    def placement(self) -> Placement:
        """Return the placement of the layer's arrays."""
        flag = self.config.moe_dispatch_no_expert_sharding
        return Placement(self.sharding, no_expert_sharding=flag)

    @property
    def strategy(self) -> Strategy:
        """Return the strategy that brings tokens to their experts.

        It is made on each access: `nnx.jit` compares the attributes of a module, and would compile
        again for an equal layer that holds another strategy object.
        """
        return make_strategy(self.config, self.placement)

    def __call__(
        self,
        x: Float[Array, "B S M"],
        residual: Float[Array, "B S M"] | None = None,
        real: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S M"], MoEStats]:
        """Apply the layer.

        Padding is sent to no expert, takes none's capacity, and counts in no statistics; what the
        layer adds for it is the shared experts' output. With `force_load_balance` it is routed as
        all tokens are, since that routing is known before the tokens are.

        Args:
            x: activations.
            residual: what router and routed experts read with `routed_norms`, where x is what
                the shared experts read; None: x.
            real: which tokens are not padding; None: all.

        Returns:
            The weighted sum of the expert outputs, in the dtype of `x` (see `dtype`), and the
            sequences' statistics.
        """
        if self.config.router.force_load_balance:
            real = None
        if self.sharding.is_explicit:
            return self._with_auto_axes(x, residual, real)
        placement = self.placement
        shared = self._of_shared(x)
        x = placement.tokens(x if residual is None else residual)
        routing = self.route(x)
        if real is not None:
            routing = routing.of_real(real)
        x = x if self.routed_norm is None else self.routed_norm(x)
        name = self.config.moe_dispatch
        if self.latent is not None:
            x = placement.tokens(self.latent.of_tokens(x))
        results = self.strategy(x, routing, self.experts)
        y, dropped = checked_results(results, x, self.experts.dtype, name=name)
        with jax.named_scope("router"):
            stats = MoEStats(
                mean_over_tokens(routing.probs, routing.real),
                router_z_loss(routing.logits, routing.real),
                expert_counts(routing.indices, self.config.num_experts),
                dropped,
                None if routing.real is None else jnp.sum(routing.real, axis=1, dtype=jnp.int32),
            )
        y = placement.tokens(y)
        if self.latent is not None:
            y = placement.tokens(self.latent.to_tokens(y))
        y = y if self.routed_out_norm is None else self.routed_out_norm(y)
        return y if shared is None else y + shared, stats

    def _with_auto_axes(
        self,
        x: Float[Array, "B S M"],
        residual: Float[Array, "B S M"] | None,
        real: Bool[Array, "B S"] | None,
    ) -> tuple[Float[Array, "B S M"], MoEStats]:
        """Apply the layer where the mesh has Explicit axes; within the call they are Auto."""
        # Parameters are arguments: closed over, they would keep their Explicit types.
        graph, state = nnx.split(self)
        y, each = self.placement.of_tokens(x.shape), self.placement.of_batch(x.shape[0])
        outside = self.sharding.outside
        stats = dict.fromkeys(MoEStats._fields, outside(each))
        if real is None:
            del stats["tokens"]

        def apply(
            state: nnx.State[Any, Any],
            x: Float[Array, "B S M"],
            residual: Float[Array, "B S M"] | None,
            real: Bool[Array, "B S"] | None,
        ) -> tuple[Float[Array, "B S M"], MoEStats]:
            return nnx.merge(graph, state)(x, residual, real)  # where `is_explicit` is False

        out = (outside(y), MoEStats(**stats))  # type: ignore[arg-type]
        return jax.sharding.auto_axes(apply, out_sharding=out)(state, x, residual, real)

    def route(self, x: Float[Array, "B S M"]) -> Routing:
        """Choose experts and combine weights for every token."""
        with jax.named_scope("router"):
            return self.router(x)

    def record(self, tokens: tuple[int, ...]) -> MoERecord:
        """Return how a call exchanges and multiplies, which fast paths it takes, and why.

        Nothing is traced or run.

        Args:
            tokens: [B S M], the shape of the layer's input on all devices together.
        """
        record = self.strategy.record(self.config.dispatched(tokens), self.experts.dtype)
        if not self.experts.gating.has_gate:
            return record.apart("the experts have no gate")
        if self.experts.adapted:
            return record.apart("adapters have products between")
        return record

    def _of_shared(self, x: Float[Array, "B S M"]) -> Float[Array, "B S M"] | None:
        """Apply the shared experts; return None where there are none."""
        if self.shared is None:
            return None
        y = self.shared(x)
        if self.shared_gate is not None:
            with jax.named_scope("mlp"):
                gate = self.shared_gate[...].astype(x.dtype)
                scale = jax.nn.sigmoid(jnp.einsum("bsm,m->bs", x, gate))
                y = scale[..., None] * y
        return y if self.shared_out_norm is None else self.shared_out_norm(y)


def _shared_gate(model_dim: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param[Array]:
    init = jax.nn.initializers.normal(stddev=model_dim**-0.5)
    return parameter(init(rngs.params(), (model_dim,), dtype), SHARED_GATE)
