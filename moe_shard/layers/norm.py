"""RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """Divides by the root mean square of the last dim, in float32, then scales.

    Args:
        dim: size of the last dim.
        epsilon: added to the mean square.
        weight_dtype: of the scale.
        axis: logical axis of the scale's dim.
    """

    def __init__(
        self, *, dim: int, epsilon: float, weight_dtype: DTypeLike, axis: str = "norm"
    ) -> None:
        self.scale = nnx.Param(jnp.ones((dim,), weight_dtype), logical_axes=(axis,))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B M"]) -> Float[Array, "*B M"]:
        """Normalise `x`; the result has its dtype."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normalised = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normalised * self.scale[...].astype(jnp.float32)).astype(x.dtype)
