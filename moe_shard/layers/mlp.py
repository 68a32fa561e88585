"""The dense gated MLP: `down(act(gate(x)) * up(x))` (arXiv 2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_shard.layers.activation import ACTIVATIONS
from moe_shard.sharding.annotate import Annotator


class MLP(nnx.Module):
    """A gated MLP.

    Args:
        model_dim: M.
        hidden_dim: F.
        activation: a name of `activation.ACTIVATIONS`.
        dtype: of the products.
        weight_dtype: of the parameters.
        annotate: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        *,
        model_dim: int,
        hidden_dim: int,
        activation: str,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        annotate: Annotator,
        rngs: nnx.Rngs,
    ) -> None:
        init = variance_scaling(1.0, "fan_in", "truncated_normal")
        axes_in, axes_out = ("embed", "mlp"), ("mlp", "embed")
        shape_in, shape_out = (model_dim, hidden_dim), (hidden_dim, model_dim)
        self.gate = nnx.Param(init(rngs.params(), shape_in, weight_dtype), logical_axes=axes_in)
        self.up = nnx.Param(init(rngs.params(), shape_in, weight_dtype), logical_axes=axes_in)
        self.down = nnx.Param(init(rngs.params(), shape_out, weight_dtype), logical_axes=axes_out)
        self.activate = ACTIVATIONS[activation]
        self.dtype = dtype
        self.annotate = annotate

    def __call__(self, x: Float[Array, "B S M"]) -> Float[Array, "B S M"]:
        """Apply the MLP."""
        with jax.named_scope("mlp"):
            gate = self._hidden(jnp.einsum("bsm,mf->bsf", x, self.gate[...].astype(self.dtype)))
            up = self._hidden(jnp.einsum("bsm,mf->bsf", x, self.up[...].astype(self.dtype)))
            hidden = self.activate(gate) * up
            y = jnp.einsum("bsf,fm->bsm", hidden, self.down[...].astype(self.dtype))
            return self.annotate(
                y, "activation_batch", "activation_length", "activation_embed", name="mlp output"
            )

    def _hidden(self, h: Float[Array, "B S F"]) -> Float[Array, "B S F"]:
        return self.annotate(
            h, "activation_batch", "activation_length", "activation_mlp", name="mlp hidden"
        )
