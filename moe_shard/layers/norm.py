"""Normalise activations: RMSNorm (arXiv 1910.07467), LayerNorm (arXiv 1607.06450)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_shard.sharding.parameter import parameter


def normalise(x: Float[Array, "*B M"], *, epsilon: float, dims: int = 1) -> Float[Array, "*B M"]:
    """Divide by the root mean square.

    Args:
        x: activations in float32.
        epsilon: number added to the mean square.
        dims: number of last dims that the mean is over, together.
    """
    over = tuple(range(-dims, 0))
    mean_square = jnp.mean(jnp.square(x), axis=over, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + epsilon)


class RMSNorm(nnx.Module):
    """Divide by the root mean square over the last dim or dims, in float32, then scale.

    The scale is a factor that begins at 1 or, where it is zero-centered, what is added to 1.

    Args:
        dim: size of the last dim, or of the last dims.
        epsilon: number added to the mean square.
        weight_dtype: dtype of the scale.
        axis: logical axis of each of the scale's dims.
        zero_centered: whether to multiply by 1 + scale.
    """

    def __init__(
        self,
        *,
        dim: int | tuple[int, ...],
        epsilon: float,
        weight_dtype: DTypeLike,
        axis: str | tuple[str | None, ...] = "norm",
        zero_centered: bool = False,
    ) -> None:
        shape = (dim,) if isinstance(dim, int) else dim
        axes = (axis,) if isinstance(axis, str) else axis
        self.scale = parameter(jnp.full(shape, not zero_centered, weight_dtype), axes)
        self.epsilon, self.dims, self.zero_centered = epsilon, len(shape), zero_centered

    def __call__(self, x: Float[Array, "*B M"]) -> Float[Array, "*B M"]:
        """Normalise `x`; the result has its dtype."""
        normalised = normalise(x.astype(jnp.float32), epsilon=self.epsilon, dims=self.dims)
        scale = self.scale[...].astype(jnp.float32)
        return (normalised * (1 + scale if self.zero_centered else scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Subtract the mean of the last dim, divide by its deviation, in float32; scale, add a bias.

    Args:
        dim: size of the last dim.
        epsilon: number added to the variance.
        weight_dtype: dtype of scale and bias.
    """

    def __init__(self, *, dim: int, epsilon: float, weight_dtype: DTypeLike) -> None:
        self.scale = parameter(jnp.ones((dim,), weight_dtype), ("norm",))
        self.bias = parameter(jnp.zeros((dim,), weight_dtype), ("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B M"]) -> Float[Array, "*B M"]:
        """Normalise `x`; the result has its dtype."""
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        scaled = x32 * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...].astype(jnp.float32)
        return (scaled + self.bias[...].astype(jnp.float32)).astype(x.dtype)
