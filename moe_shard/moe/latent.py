"""Project tokens to the latent that experts work on, and the sum of their outputs back.

The first projection comes before dispatch and the second after combine, so that it is the latent,
smaller than a token, that is exchanged (Nemotron 3 Super). The router and the shared experts read
the tokens themselves.

    B  batch    S  sequence    M  model dim    L  dim of the latent
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_shard.layers.mlp import WEIGHT_IN, WEIGHT_OUT
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.parameter import parameter


class Latent(nnx.Module):
    """Project [B S M] to [B S L] and back. The latent is split over `tensor` as a hidden dim is.

    Args:
        model_dim: M, the model dim.
        latent_dim: L.
        dtype: dtype of the products.
        weight_dtype: dtype of the parameters.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        *,
        model_dim: int,
        latent_dim: int,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        sharding: Sharding,
        rngs: nnx.Rngs,
    ) -> None:
        init = variance_scaling(1.0, "fan_in", "truncated_normal")
        self.down = parameter(init(rngs.params(), (model_dim, latent_dim), weight_dtype), WEIGHT_IN)
        self.up = parameter(init(rngs.params(), (latent_dim, model_dim), weight_dtype), WEIGHT_OUT)
        self.dtype, self.sharding = dtype, sharding

    def of_tokens(self, x: Float[Array, "B S M"]) -> Float[Array, "B S L"]:
        """Project tokens to their latents."""
        with jax.named_scope("mlp"):
            down = self.sharding.use_weight(
                self.down[...].astype(self.dtype),
                WEIGHT_IN,
                (None, "activation_mlp"),
                name="moe latent down",
            )
            return jnp.einsum("bsm,ml->bsl", x, down)

    def to_tokens(self, y: Float[Array, "B S L"]) -> Float[Array, "B S M"]:
        """Project the weighted sums of the experts' outputs back."""
        with jax.named_scope("mlp"):
            up = self.sharding.use_weight(
                self.up[...].astype(self.dtype),
                WEIGHT_OUT,
                ("activation_mlp", None),
                name="moe latent up",
            )
            return jnp.einsum("bsl,lm->bsm", y, up)
