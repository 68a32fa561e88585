"""The dense gated MLP: `down(act(gate(x)) * up(x))` (arXiv 2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_shard.config.model import GatingConfig
from moe_shard.layers.activation import ACTIVATIONS
from moe_shard.sharding.annotate import Annotator

WEIGHT_IN, WEIGHT_OUT = ("embed", "mlp"), ("mlp", "embed")


class MLP(nnx.Module):
    """A gated MLP.

    Args:
        model_dim: M.
        hidden_dim: F.
        gating: activation, clamps, offset, biases.
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
        gating: GatingConfig,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        annotate: Annotator,
        rngs: nnx.Rngs,
    ) -> None:
        init = variance_scaling(1.0, "fan_in", "truncated_normal")
        shape_in, shape_out = (model_dim, hidden_dim), (hidden_dim, model_dim)
        self.gate = nnx.Param(init(rngs.params(), shape_in, weight_dtype), logical_axes=WEIGHT_IN)
        self.up = nnx.Param(init(rngs.params(), shape_in, weight_dtype), logical_axes=WEIGHT_IN)
        self.down = nnx.Param(init(rngs.params(), shape_out, weight_dtype), logical_axes=WEIGHT_OUT)
        self.activate = ACTIVATIONS[gating.activation]
        self.dtype = dtype
        self.annotate = annotate

    def __call__(self, x: Float[Array, "B S M"]) -> Float[Array, "B S M"]:
        """Apply the MLP."""
        with jax.named_scope("mlp"):
            gate = self._project(x, self.gate, "mlp gate")
            up = self._project(x, self.up, "mlp up")
            down = self.annotate.use_weight(
                self.down[...].astype(self.dtype),
                WEIGHT_OUT,
                ("activation_mlp", None),
                name="mlp down",
            )
            y = jnp.einsum("bsf,fm->bsm", self.activate(gate) * up, down)
            return self.annotate(
                y, "activation_batch", "activation_length", "activation_embed", name="mlp output"
            )

    def _project(
        self, x: Float[Array, "B S M"], kernel: nnx.Param[Array], name: str
    ) -> Float[Array, "B S F"]:
        kernel_in_use = self.annotate.use_weight(
            kernel[...].astype(self.dtype), WEIGHT_IN, (None, "activation_mlp"), name=name
        )
        return self.annotate(
            jnp.einsum("bsm,mf->bsf", x, kernel_in_use),
            "activation_batch",
            "activation_length",
            "activation_mlp",
            name="mlp hidden",
        )
