"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450)."""

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


class LayerNorm(nnx.Module):
    """Takes the mean of the last dim away, divides by its deviation, in float32; scale and bias.

    Args:
        dim: size of the last dim.
        epsilon: added to the variance.
        weight_dtype: of scale and bias.
    """

    def __init__(self, *, dim: int, epsilon: float, weight_dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((dim,), weight_dtype), logical_axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((dim,), weight_dtype), logical_axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B M"]) -> Float[Array, "*B M"]:
        """Normalise `x`; the result has its dtype."""
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        scaled = x32 * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...].astype(jnp.float32)
        return (scaled + self.bias[...].astype(jnp.float32)).astype(x.dtype)
