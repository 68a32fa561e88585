"""The experts: E gated MLPs computed as batched products. Arithmetic only; no mesh.

How arrays are pinned is the business of `placement.py`, which the caller hands in.
"""

from __future__ import annotations

from typing import Protocol

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_shard.layers.activation import ACTIVATIONS
from moe_shard.moe.placement import EXPERT_WEIGHT_IN, EXPERT_WEIGHT_OUT


class Pins(Protocol):
    """Constraints on the arrays inside the experts."""

    def weight_in(self, w: Float[Array, "E M H"]) -> Float[Array, "E M H"]:
        """Pin a gate or up projection."""
        ...

    def weight_out(self, w: Float[Array, "E H M"]) -> Float[Array, "E H M"]:
        """Pin a down projection."""
        ...

    def hidden(self, h: Float[Array, "E B C H"]) -> Float[Array, "E B C H"]:
        """Pin a hidden activation."""
        ...


class Experts(nnx.Module):
    """`down(act(gate(x)) * up(x))` for each expert on its own slots.

    Args:
        num_experts: E.
        model_dim: M.
        hidden_dim: H.
        activation: a name of `layers.activation.ACTIVATIONS`.
        dtype: of the products.
        weight_dtype: of the parameters.
        pins: constraints on weights and hidden activations.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        model_dim: int,
        hidden_dim: int,
        activation: str,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        pins: Pins,
        rngs: nnx.Rngs,
    ) -> None:
        init = variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        shape_in = (num_experts, model_dim, hidden_dim)
        shape_out = (num_experts, hidden_dim, model_dim)
        self.gate = nnx.Param(
            init(rngs.params(), shape_in, weight_dtype), logical_axes=EXPERT_WEIGHT_IN
        )
        self.up = nnx.Param(
            init(rngs.params(), shape_in, weight_dtype), logical_axes=EXPERT_WEIGHT_IN
        )
        self.down = nnx.Param(
            init(rngs.params(), shape_out, weight_dtype), logical_axes=EXPERT_WEIGHT_OUT
        )
        self.activate = ACTIVATIONS[activation]
        self.dtype = dtype
        self.pins = pins

    def __call__(self, x: Float[Array, "E B C M"]) -> Float[Array, "E B C M"]:
        """Apply each expert to its slots."""
        pins = self.pins
        # Pinned once more after the cast, so that FSDP gathers weights in the narrow dtype.
        gate = pins.weight_in(self.gate[...].astype(self.dtype))
        up = pins.weight_in(self.up[...].astype(self.dtype))
        down = pins.weight_out(self.down[...].astype(self.dtype))
        gated = self.activate(pins.hidden(jnp.einsum("ebcm,emh->ebch", x, gate)))
        hidden = gated * pins.hidden(jnp.einsum("ebcm,emh->ebch", x, up))
        return jnp.einsum("ebch,ehm->ebcm", hidden, down)
