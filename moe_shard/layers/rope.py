"""Rotary position embedding (RoFormer, arXiv 2104.09864) and how it is stretched.

A pair of elements turns by position * frequency. Frequencies are made in NumPy, in float64, while
a program is traced: they depend on nothing but the configuration and on how long a text may be.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_shard.config.attention_config import RopeConfig


def apply_rope(
    x: Float[Array, "B S N D"],
    positions: Int[Array, "B S"],
    *,
    rope: RopeConfig,
    turned_dim: int,
    length: int,
) -> Float[Array, "B S N D"]:
    """Turn the pairs in the first elements of each head; the other elements stay.

    Turned pairs stay where they are, neighbours or halves: scores do not depend on the order of a
    head's elements as long as queries and keys have the same.

    Args:
        x: queries or keys.
        positions: place of each token in its document.
        rope: pairs and frequencies.
        turned_dim: elements of a head that turn, even.
        length: tokens that a row has or may come to have.
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
    """What cosines and sines are multiplied by; YaRN's temperature of the softmax."""
    if rope.rope_attention_factor != -1:
        return rope.rope_attention_factor
    return 0.1 * math.log(rope.rope_factor) + 1 if rope.rope_attention_scaling else 1.0


def rope_frequencies(rope: RopeConfig, *, turned_dim: int, length: int) -> np.ndarray:
    """Radians that each pair turns by from one position to the next, in float64.

    Args:
        rope: the kind of stretching, and its numbers.
        turned_dim: elements of a head that turn, two for each frequency.
        length: tokens that a row has or may come to have; longrope tells short rows from long
            ones by it. A row that grows in a cache is as long as its places from the start, so
            that keys turned before need not be turned again.
    """
    kept = rope.rope_max_timescale ** (-np.arange(0, turned_dim, 2) / turned_dim)
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


def _by_wavelength(kept: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Llama 3.1: waves longer than the original length are stretched, short ones are not."""
    waves = rope.original_max_position_embeddings * kept / (2 * np.pi)  # in the original length
    low, high = rope.rope_low_freq_factor, rope.rope_high_freq_factor
    # A ramp of no width is a step: Llama 4 has it.
    share = (waves - low) / (high - low) if high != low else waves >= low
    return _blend(kept, kept / rope.rope_factor, np.clip(share, 0, 1))


def _by_rotations(kept: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over the pairs between two rotation counts."""
    dim = 2 * len(kept)

    def pair_that_rotates(times: float) -> float:
        waves = rope.original_max_position_embeddings / (2 * math.pi * times)
        return dim * math.log(waves) / (2 * math.log(rope.rope_max_timescale))

    low, high = pair_that_rotates(rope.beta_fast), pair_that_rotates(rope.beta_slow)
    if rope.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper bound is in elements and not in pairs, as in every released implementation.
    low, high = max(low, 0), min(high, dim - 1)
    # A ramp of no width is a step.
    ramp = (np.arange(len(kept)) - low) / (high - low if high != low else 0.001)
    return _blend(kept, kept / rope.rope_factor, 1 - np.clip(ramp, 0, 1))


def _blend(kept: np.ndarray, divided: np.ndarray, share: np.ndarray) -> np.ndarray:
    return share * kept + (1 - share) * divided
