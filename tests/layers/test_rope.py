"""Frequencies equal hand counts, and rotations equal products of complex numbers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.config.attention_config import RopeConfig
from moe_shard.layers.rope import apply_rope, rope_frequencies, rope_magnitude
from tests.layers import oracle
from tests.layers.build import layer_config
from tests.models.build import assert_close

LONGROPE = (
    "rope_type=longrope",
    "rope_short_factors=[1.0, 1.5, 2.0, 3.0]",
    "rope_long_factors=[2.0, 4.0, 8.0, 16.0]",
    "original_max_position_embeddings=12",
    "rope_attention_factor=1.19",
)
TYPES = {
    "default": (),
    "llama3.1": (
        "rope_type=llama3.1",
        "original_max_position_embeddings=40",
        "rope_factor=8",
    ),
    "yarn": (
        "rope_type=yarn",
        "original_max_position_embeddings=64",
        "rope_factor=4",
        "beta_fast=4",
        "beta_slow=0.5",
        "rope_attention_scaling=true",
    ),
    "yarn-not-truncated": (
        "rope_type=yarn",
        "original_max_position_embeddings=64",
        "rope_factor=4",
        "beta_fast=4",
        "beta_slow=0.5",
        "rope_truncate=false",
        "rope_attention_factor=0.8",
    ),
    "longrope": LONGROPE,
}


def rope_config(*overrides: str) -> RopeConfig:
    return layer_config({}, *overrides).model.attention.rope


def test_default_frequencies_fall_from_1_by_equal_ratios() -> None:
    rope = rope_config("rope_max_timescale=10000")
    found = rope_frequencies(rope, turned_dim=8, length=1)
    np.testing.assert_allclose(found, [1, 0.1, 0.01, 0.001], rtol=1e-14)
    assert found.dtype == np.float64


def test_llama_3_1_divides_long_waves_keeps_short_ones_and_blends_between() -> None:
    # A pair rotates 1000, 16, 2 or 1/4 times over the 8192 positions of the original length. One
    # that rotates at most once is divided by 8, one that rotates 4 times or more is not, and 2 is a
    # third of the way: 1/3 + 2/3 / 8 = 5/12.
    for waves, share in ((1000, 1), (16, 1), (2, 5 / 12), (0.25, 1 / 8)):
        theta = (8192 / waves / (2 * math.pi)) ** 2  # the second of two pairs
        rope = rope_config(
            "rope_type=llama3.1",
            f"rope_max_timescale={theta!r}",
            "rope_factor=8",
            "original_max_position_embeddings=8192",
            "rope_low_freq_factor=1",
            "rope_high_freq_factor=4",
        )
        found = rope_frequencies(rope, turned_dim=4, length=1)
        np.testing.assert_allclose(found, [1, share * 2 * math.pi * waves / 8192], rtol=1e-12)


@pytest.mark.parametrize(
    ("truncate", "exponents", "bounds"),
    # Pair i of 8 has frequency 4**-i, so it rotates original / (2 pi) / beta times at beta = 4**i.
    [
        pytest.param("false", (2, 5), (2, 5), id="whole"),
        pytest.param("true", (2.5, 4.5), (2, 5), id="rounded-outwards"),
        pytest.param("false", (2.5, 4.5), (2.5, 4.5), id="not-rounded"),
        pytest.param("false", (-1, 3), (0, 3), id="from-the-first-pair"),
        pytest.param("false", (2, 10), (2, 10), id="beyond-the-last-pair"),
        pytest.param("false", (2, 20), (2, 15), id="no-further-than-elements"),
    ],
)
def test_yarn_ramps_between_two_pairs(
    truncate: str, exponents: tuple[float, float], bounds: tuple[float, float]
) -> None:
    fast, slow = (4096 / (2 * math.pi) / 4.0**each for each in exponents)
    rope = rope_config(
        "rope_type=yarn",
        f"rope_max_timescale={4**8}",
        "rope_factor=16",
        "original_max_position_embeddings=4096",
        f"beta_fast={fast!r}",
        f"beta_slow={slow!r}",
        f"rope_truncate={truncate}",
    )
    kept = 4.0 ** -np.arange(8)
    divided = np.interp(np.arange(8), bounds, (0, 1))
    found = rope_frequencies(rope, turned_dim=16, length=1)
    np.testing.assert_allclose(found, kept * (1 - divided * 15 / 16), rtol=1e-9)


def test_a_ramp_of_no_width_is_a_step() -> None:
    rotations = 4096 / (2 * math.pi) / 4.0**3
    rope = rope_config(
        "rope_type=yarn",
        f"rope_max_timescale={4**8}",
        "rope_factor=16",
        "original_max_position_embeddings=4096",
        f"beta_fast={rotations!r}",
        f"beta_slow={rotations!r}",
        "rope_truncate=false",
    )
    found = rope_frequencies(rope, turned_dim=16, length=1) * 4.0 ** np.arange(8)
    np.testing.assert_allclose(found[[0, 1, 2, 4, 5, 6, 7]], [1] * 3 + [1 / 16] * 4, rtol=1e-9)


def test_longrope_takes_long_factors_beyond_the_original_length() -> None:
    rope = rope_config(*LONGROPE, "rope_max_timescale=10000")
    kept = 10.0 ** -np.arange(4)
    for length, factors in ((12, [1, 1.5, 2, 3]), (13, [2, 4, 8, 16])):
        found = rope_frequencies(rope, turned_dim=8, length=length)
        np.testing.assert_allclose(found, kept / factors, rtol=1e-14)


def test_magnitude_is_the_factor_given_or_that_of_yarn_or_none() -> None:
    assert rope_magnitude(rope_config("rope_factor=40")) == 1
    scaled = ("rope_factor=40", "rope_attention_scaling=true")
    assert rope_magnitude(rope_config(*scaled)) == pytest.approx(1.3688879454, rel=1e-10)
    assert rope_magnitude(rope_config(*scaled, "rope_attention_factor=1.19")) == 1.19


@pytest.mark.parametrize("interleave", ["true", "false"])
@pytest.mark.parametrize("partial", [0.5, 1])
@pytest.mark.parametrize("kind", TYPES)
def test_rotating_is_a_product_of_complex_numbers(
    kind: str, partial: float, interleave: str
) -> None:
    overrides = [*TYPES[kind], f"partial_rotary_factor={partial}", f"rope_interleave={interleave}"]
    overrides.append(f"head_dim={round(8 / partial)}")
    config = layer_config({}, *overrides)
    keys, attention = config.as_flat_dict(), config.model.attention
    rng = np.random.default_rng(0)
    tokens = 20
    x = rng.standard_normal((2, tokens, 3, attention.head_dim)).astype(np.float32)
    positions = rng.integers(0, 200, (2, tokens)).astype(np.int32)
    found = jax.jit(
        lambda x: apply_rope(
            x,
            jnp.asarray(positions),
            rope=attention.rope,
            turned_dim=attention.turned_dim,
            length=tokens,
        )
    )(x)
    expected = [
        [oracle.rotate(x[b, :, n].astype(np.float64), positions[b], keys) for n in range(3)]
        for b in range(2)
    ]
    assert_close(found, np.stack(expected).swapaxes(1, 2), 2e-5)  # float32 angles up to 200
