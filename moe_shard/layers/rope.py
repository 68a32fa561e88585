"""Rotate queries and keys by their positions (RoPE, arXiv 2104.09864), and extend its reach.

Each pair of elements is rotated by position * frequency. Frequencies are computed in NumPy, in
float64, at tracing: they depend on the configuration and on the longest length alone.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from moe_shard.config.attention_config import RopeConfig


def apply_rope(
    x: Float[Array, "B S N D"],
    positions: Int[Array, "B S"],
    *,
    rope: RopeConfig,
    turned_dim: int,
    length: int,
) -> Float[Array, "B S N D"]:
    """Rotate pairs among the first elements of each head; leave the other elements alone.

    Rotated pairs keep their places, neighbours or halves: scores do not depend on the order of a
    head's elements as long as queries and keys have the same.

    Args:
        x: queries or keys.
        positions: position of each token in its document.
        rope: pairs and frequencies.
        turned_dim: number of rotated elements of a head, even.
        length: tokens that a sequence has or may come to have.
    """
    frequency = rope_frequencies(rope, turned_dim=turned_dim, length=length)
    angle = positions[..., None, None].astype(jnp.float32) * frequency.astype(np.float32)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    magnitude = rope_magnitude(rope)
    if magnitude != 1:
        sin, cos = sin * magnitude, cos * magnitude
    turned, rest = x[..., :turned_dim].astype(jnp.float32), x[..., turned_dim:]
    if rope.rope_interleave:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    if rope.rope_interleave:
        rotated = jnp.stack(pair, axis=-1).reshape(turned.shape)
    else:
        rotated = jnp.concatenate(pair, axis=-1)
    rotated = rotated.astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def rope_magnitude(rope: RopeConfig) -> float:
    """Return the factor of cosines and sines: YaRN's temperature of the softmax."""
    if rope.rope_attention_factor != -1:
        return rope.rope_attention_factor
    return 0.1 * math.log(rope.rope_factor) + 1 if rope.rope_attention_scaling else 1.0


def rope_frequencies(
    rope: RopeConfig, *, turned_dim: int, length: int
) -> Float64[np.ndarray, "pairs"]:
    """Compute the radians that each pair is rotated by per position, in float64.

    Args:
        rope: the kind of extension, and its numbers.
        turned_dim: number of rotated elements of a head, two for each frequency.
        length: tokens that a sequence has or may come to have; longrope has other factors for
            long sequences than for short ones. With a cache this is the number of its places
            from the start, so that cached keys stay valid as the sequence grows.
    """
    kept = rope.rope_max_timescale ** (-np.arange(0, turned_dim, 2) / turned_dim)
    if rope.rope_type == "proportional":
        turning = int(turned_dim * rope.partial_rotary_factor) // 2
        return np.where(np.arange(len(kept)) < turning, kept, 0.0)
    if rope.rope_type == "llama3.1":
        return _by_wavelength(kept, rope)
    if rope.rope_type == "yarn":
        return _by_rotations(kept, rope)
    if rope.rope_type == "longrope":
        factors = (
            rope.rope_long_factors
            if length > rope.original_max_position_embeddings
            else rope.rope_short_factors
        )
        return kept / np.asarray(factors)
    return kept


def _by_wavelength(
    kept: Float64[np.ndarray, "pairs"], rope: RopeConfig
) -> Float64[np.ndarray, "pairs"]:
    """Stretch waves longer than the original length and keep short ones, as Llama 3.1 does."""
    waves = rope.original_max_position_embeddings * kept / (2 * np.pi)  # in the original length
    low, high = rope.rope_low_freq_factor, rope.rope_high_freq_factor
    # A ramp of width 0 is a step, as in Llama 4.
    ramp = (waves - low) / (high - low) if high != low else (waves >= low).astype(np.float64)
    return _blend(kept, kept / rope.rope_factor, np.clip(ramp, 0, 1))


def _by_rotations(
    kept: Float64[np.ndarray, "pairs"], rope: RopeConfig
) -> Float64[np.ndarray, "pairs"]:
    """Blend by a ramp between two rotation counts: YaRN (arXiv 2309.00071, section 3.2)."""
    dim = 2 * len(kept)

    def pair_that_rotates(times: float) -> float:
        waves = rope.original_max_position_embeddings / (2 * math.pi * times)
        return dim * math.log(waves) / (2 * math.log(rope.rope_max_timescale))

    low, high = pair_that_rotates(rope.beta_fast), pair_that_rotates(rope.beta_slow)
    if rope.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper bound is in elements and not in pairs, as in every released implementation.
    low, high = max(low, 0), min(high, dim - 1)
    # A ramp of width 0 is a step.
    ramp = (np.arange(len(kept)) - low) / (high - low if high != low else 0.001)
    return _blend(kept, kept / rope.rope_factor, 1 - np.clip(ramp, 0, 1))


def _blend(
    kept: Float64[np.ndarray, "pairs"],
    divided: Float64[np.ndarray, "pairs"],
    weight: Float64[np.ndarray, "pairs"],
) -> Float64[np.ndarray, "pairs"]:
    return weight * kept + (1 - weight) * divided
