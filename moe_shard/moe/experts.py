"""The experts: E gated MLPs, `down(act(gate(x)) * up(x))`. Arithmetic only; no mesh.

What multiplies rows with experts' weights is handed in: batched products over capacity slots, or a
grouped product over rows that stand by expert. So is what pins the arrays in between.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_shard.config.model import GatingConfig
from moe_shard.layers.activation import ACTIVATIONS
from moe_shard.moe.placement import EXPERT_WEIGHT_FUSED, EXPERT_WEIGHT_IN, EXPERT_WEIGHT_OUT
from moe_shard.moe.weights import ExpertWeights, fuse

Product = Callable[[Array, Array], Array]
"""Rows [*R A], each by the weights [E A *P] of its own expert: rows [*R *P]."""


def gated_mlp(
    x: Float[Array, "*R M"],
    weights: ExpertWeights,
    *,
    product: Product,
    activate: Callable[[Float[Array, "*R H"]], Float[Array, "*R H"]],
    pin_hidden: Callable[[Float[Array, "*R H"]], Float[Array, "*R H"]] = lambda h: h,
) -> Float[Array, "*R M"]:
    """Apply each row's expert to it.

    Args:
        x: rows; `product` knows which expert each belongs to.
        weights: of the experts at hand, in the dtype of the products.
        product: see `Product`.
        activate: the gate's nonlinearity.
        pin_hidden: says where the hidden activations live.
    """
    if weights.fused:
        both = product(x, weights.inward[0])
        gate, up = both[..., 0, :], both[..., 1, :]
    else:
        gate, up = (product(x, w) for w in weights.inward)
    return product(activate(pin_hidden(gate)) * pin_hidden(up), weights.down)


def batched_product(
    x: Float[Array, "E *R A"], w: Float[Array, "E A *P"]
) -> Float[Array, "E *R *P"]:
    """The `Product` where every expert has equally many rows."""
    rows, out = "bc"[: x.ndim - 2], "gh"[-(w.ndim - 2) :]
    return jnp.einsum(f"e{rows}a,ea{out}->e{rows}{out}", x, w)


class Experts(nnx.Module):
    """The parameters of the experts.

    Args:
        num_experts: E.
        model_dim: M.
        hidden_dim: H.
        gating: activation, clamps, offset, biases.
        fused: keep gate and up in one parameter `gate_up`, [E M 2 H].
        dtype: of the products.
        weight_dtype: of the parameters.
        rngs: source of the initial weights, the same fused or not.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        model_dim: int,
        hidden_dim: int,
        gating: GatingConfig,
        fused: bool,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        init = variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        shape_in = (num_experts, model_dim, hidden_dim)
        shape_out = (num_experts, hidden_dim, model_dim)
        gate = init(rngs.params(), shape_in, weight_dtype)
        up = init(rngs.params(), shape_in, weight_dtype)
        if fused:
            self.gate_up = nnx.Param(fuse(gate, up), logical_axes=EXPERT_WEIGHT_FUSED)
        else:
            self.gate = nnx.Param(gate, logical_axes=EXPERT_WEIGHT_IN)
            self.up = nnx.Param(up, logical_axes=EXPERT_WEIGHT_IN)
        self.down = nnx.Param(
            init(rngs.params(), shape_out, weight_dtype), logical_axes=EXPERT_WEIGHT_OUT
        )
        self.fused = fused
        self.activate = ACTIVATIONS[gating.activation]
        self.dtype = dtype

    def weights(self) -> ExpertWeights:
        """The parameters in the dtype of the products, where they are stored.

        Cast here, on the shards, so that FSDP gathers weights in the narrow dtype.
        """
        inward = (self.gate_up,) if self.fused else (self.gate, self.up)
        return ExpertWeights(
            tuple(w[...].astype(self.dtype) for w in inward), self.down[...].astype(self.dtype)
        )
