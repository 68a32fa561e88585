"""Rotary position embedding (RoFormer, arXiv 2104.09864), halves paired as in Llama and Mixtral."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_rope(
    x: Float[Array, "B S N D"], positions: Int[Array, "B S"], max_timescale: float
) -> Float[Array, "B S N D"]:
    """Rotate the pairs (i, i + D/2) of each head by angles that grow with the position.

    Args:
        x: queries or keys; D is even.
        positions: place of each token in its document.
        max_timescale: theta, the longest wavelength over 2 pi, in positions.
    """
    half = x.shape[-1] // 2
    frequency = max_timescale ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
