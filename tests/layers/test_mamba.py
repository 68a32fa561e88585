"""Mamba-2 and the short convolution equal NumPy that goes token by token, on meshes, apart."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_shard.config import Config
from moe_shard.errors import UserError
from moe_shard.layers.cache import Memory
from moe_shard.models.mixers import MIXERS
from tests.layers import mamba_oracle
from tests.layers.build import (
    Layer,
    Sizes,
    Text,
    assert_gradients,
    describe,
    layer_annotator,
    layer_config,
    packed,
    random_like,
    value_and_grads,
)
from tests.models.build import QUICK, assert_close

MAMBA = (
    "mixer_pattern=[mamba2]", "mamba_num_heads=4", "mamba_head_dim=3", "mamba_num_groups=2",
    "mamba_state_dim=5", "mamba_conv_kernel_dim=3", "mamba_chunk_size=4",
)  # fmt: skip
BIASES = ("mamba_proj_bias=true", "mamba_step_min=0.3", "mamba_step_max=1.2")
SHORT = ("mixer_pattern=[short_convolution]",)
ONE_GROUP = ("mamba_conv_bias=false", "mamba_num_groups=1")
CASES = [
    pytest.param(MAMBA, {"data": 2, "fsdp": 2, "tensor": 2}, BIASES, id="groups-over-tensor"),
    pytest.param(MAMBA, {"expert": 2, "tensor": 4}, ONE_GROUP, id="heads-over-tensor"),
    pytest.param(SHORT, {"data": 2, "fsdp": 2, "tensor": 2}, ("short_conv_bias=true",), id="short"),
]


def layer_of(sizes: Sizes, *overrides: str) -> tuple[Config, Layer, Any]:
    """Describe the mixer of a layer on a mesh, and the placement of its activations."""
    config = layer_config(sizes, *overrides)
    sharding, kind = layer_annotator(config, sizes), config.model.layer_kinds[0]
    entry = MIXERS[kind.mixer]
    layer = describe(
        lambda rngs: cast(nnx.Module, entry.make(config.model, kind, sharding, rngs)), sharding
    )
    return config, layer, sharding.named_sharding("x", ("activation_batch", None, None), (8, 1, 1))


def by_numpy(config: Config, text: Text) -> Any:
    keys = config.as_flat_dict()
    if config.model.layer_kinds[0].mixer == "mamba2":
        return lambda params, x: mamba_oracle.mamba(x, params, text.segment_ids, keys)
    return lambda params, x: mamba_oracle.short_convolution(x, params, text.segment_ids)


@pytest.mark.parametrize(("base", "sizes", "overrides"), CASES)
def test_outputs_and_gradients_equal_numpy(
    base: tuple[str, ...], sizes: Sizes, overrides: tuple[str, ...]
) -> None:
    config, layer, place = layer_of(sizes, *base, *overrides)
    text, params = packed(8 if sizes else 2), random_like(layer.shapes)
    probe = np.random.default_rng(2).standard_normal(text.x.shape)

    def call(module: Any, x: jax.Array) -> jax.Array:
        return module(x, jnp.asarray(text.positions), jnp.asarray(text.segment_ids))[0]

    y, grads = value_and_grads(call, layer, params, text.x, probe, place)
    oracle, x = by_numpy(config, text), text.x.astype(np.float64)
    assert_close(y, oracle(params, x))
    assert_gradients(grads, (params, x), lambda at: float(np.sum(oracle(*at) * probe)))


@pytest.mark.parametrize("base", [MAMBA, SHORT], ids=["mamba", "short"])
def test_documents_are_apart_and_a_text_goes_on_where_a_call_ended(base: tuple[str, ...]) -> None:
    _, layer, _ = layer_of({}, *base)
    module = nnx.merge(layer.graph, jax.tree.map(np.float32, random_like(layer.shapes)))
    x = packed(1, 11).x
    ids = np.array([[1] * 5 + [4] * 5 + [2]], np.int32)
    run = jax.jit(module, compiler_options=QUICK)
    together, _ = run(x, ids, ids)
    cache, parts = module.empty_cache(1, 11), []
    for first, last in ((0, 5), (5, 10), (10, 11)):  # each is a document
        alone, _ = run(x[:, first:last], ids[:, first:last], np.zeros((1, last - first), np.int32))
        np.testing.assert_allclose(alone, together[:, first:last], rtol=2e-6, atol=2e-6)
    for first, last in ((0, 5), (5, 6), (6, 11)):  # and none of these the last two
        places = np.where(np.arange(11) < last, ids, -1)
        memory = Memory(cache, jnp.int32(first), jnp.asarray(ids), jnp.asarray(places))
        part, cache = run(x[:, first:last], ids[:, first:last], ids[:, first:last], memory)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, 1), together, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mamba_num_heads=6", "mamba_num_groups=4"], "one of [1, 2, 3, 6]"),
        (["mamba_step_min=2", "mamba_step_max=1"], "mamba_step_max=1 is below mamba_step_min=2"),
    ],
)
def test_what_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        layer_config({}, *overrides)
    assert words in str(error.value)
