"""A text processed in pieces has the outputs of one call, whatever the layer caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_shard.layers import heads, mla
from moe_shard.layers.cache import EMPTY, LayerCache, Memory
from moe_shard.layers.kernels import blockwise
from tests.layers import oracle
from tests.layers.build import (
    MLA,
    TOKENS,
    Sizes,
    attention_layer,
    layer_annotator,
    layer_config,
    packed,
    random_like,
)
from tests.layers.test_attention import CASES
from tests.models.build import QUICK, assert_close, label

PIECES = {"at-once": [TOKENS], "token-by-token": [1] * TOKENS, "uneven": [5, 1, 4, 2]}
PLACES = TOKENS + 4
KEPT = (
    "plain",
    "sliding",
    "chunked",
    "no-rope",
    "tempered",
    "norm-l2",
    "longrope-beyond",
    "sliding-sink-soft-cap-bias",
    "mla",
    "mla-query-latent-bias-yarn",
    "mla-sliding-sink-soft-cap",
    "mla-indexer-interleaved-sink",
)


class Read(NamedTuple):
    """Hold a layer's output for a text, the oracle's, and the layer's cache."""

    y: np.ndarray
    expected: np.ndarray
    cache: LayerCache


def read(sizes: Sizes, overrides: tuple[str, ...], pieces: Sequence[int], rows: int) -> Read:
    config = layer_config(sizes, *overrides)
    sharding = layer_annotator(config, sizes)
    layer = attention_layer(config, sharding)
    keys, kind = config.as_flat_dict(), config.model.layer_kinds[0]
    text, wide = packed(rows), random_like(layer.shapes)
    params = jax.device_put(jax.tree.map(np.float32, wide), layer.places)

    def step(params: Any, piece: Any, memory: Memory) -> tuple[jax.Array, Memory]:
        x, positions, segment_ids = piece

        def write(kept: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(kept, new, memory.slot, axis=1)

        memory = memory._replace(
            positions=write(memory.positions, positions),
            segment_ids=write(memory.segment_ids, segment_ids),
        )
        y, cache = nnx.merge(layer.graph, params)(x, positions, segment_ids, memory)
        return y, memory._replace(layer=cache, slot=memory.slot + x.shape[1])

    module = nnx.merge(layer.graph, params)
    empty = jnp.full((rows, PLACES), EMPTY, jnp.int32)
    memory = Memory(
        jax.jit(lambda: module.empty_cache(rows, PLACES))(),
        jnp.zeros((), jnp.int32),
        jnp.zeros_like(empty),
        empty,
    )
    # The numbers in unused places must not matter, so they are not 0 here.
    memory = memory._replace(layer=jax.tree.map(lambda a: a + 100, memory.layer))
    found, first = [], 0
    jitted = jax.jit(step, compiler_options=QUICK)
    for size in pieces:
        piece = [each[:, first : first + size] for each in text]
        y, memory = jitted(params, piece, memory)
        found.append(jax.device_get(y))
        first += size
    masks = [
        oracle.mask(*each, keys, kind.span)
        for each in zip(text.positions, text.segment_ids, strict=True)
    ]
    expected = oracle.attention(
        text.x.astype(np.float64), wide, masks, text.positions, keys, kind.rope
    )
    return Read(np.concatenate(found, axis=1), expected, memory.layer)


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("pieces", ["token-by-token", "uneven"])
def test_read_in_pieces(case: str, pieces: str) -> None:
    got = read({}, CASES[case], PIECES[pieces], rows=2)
    assert_close(got.y, got.expected)


@pytest.mark.parametrize("case", ["plain", "mla-query-latent-bias-yarn"])
def test_read_at_once(case: str) -> None:
    got = read({}, CASES[case], PIECES["at-once"], rows=2)
    assert_close(got.y, got.expected)


@pytest.mark.parametrize(
    "case", ["plain", "chunked", "sliding-sink-soft-cap-bias", "mla", "mla-indexer"]
)
def test_a_long_prompt_is_read_block_by_block(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (heads, mla):
        monkeypatch.setattr(module, "SHORT", 4)
    monkeypatch.setattr(blockwise, "CPU_BLOCK", 8)
    monkeypatch.setattr(blockwise, "_SMALLEST", 4)
    sizes = {"fsdp": 2, "tensor": 2} if case == "mla" else {}
    got = read(sizes, CASES[case], [6, 1, 5], rows=2)
    assert_close(got.y, got.expected)


@pytest.mark.parametrize("case", ["sliding-sink-soft-cap-bias", "mla-query-latent-bias-yarn"])
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2, "expert": 2}, {"data": 8}], ids=label)
def test_on_meshes_the_cache_stays_split(case: str, sizes: Sizes) -> None:
    got = read(sizes, CASES[case], [6, 6], rows=8)
    assert_close(got.y, got.expected)
    tensor = sizes.get("tensor", 1)
    for name, array in got.cache.items():
        rows, _, *dims = array.sharding.shard_shape(array.shape)
        assert rows == tensor, name  # of 8, over the other axes
        if array.ndim == 4:
            assert dims == [2 // tensor, 8], name


def test_mla_keeps_the_latent_and_the_shared_key_only() -> None:
    cache = read({}, MLA, PIECES["at-once"], rows=2).cache
    shapes = {name: array.shape for name, array in cache.items()}
    assert shapes == {"latent": (2, PLACES, 8), "rope_key": (2, PLACES, 4)}


def test_a_step_of_mla_does_not_expand_the_cache_to_heads() -> None:
    config = layer_config({}, *MLA)
    layer = attention_layer(config, layer_annotator(config, {}))
    places = 512

    def step(params: Any, x: jax.Array) -> jax.Array:
        module = nnx.merge(layer.graph, params)
        at = jnp.zeros((1, 1), jnp.int32)
        known = jnp.zeros((1, places), jnp.int32)
        memory = Memory(module.empty_cache(1, places), at[0, 0], known, known)
        return module(x, at, at, memory)[0]

    program = jax.make_jaxpr(step)(layer.shapes, packed(1, 1).x)
    sizes = [np.prod(v.aval.shape) for eqn in program.eqns for v in eqn.outvars]
    # Values of one head for all places are 12 * 512, the latents 8 * 512.
    assert max(sizes) == 8 * places
