"""A gated delta net equals one in NumPy that goes token by token: outputs, gradients, documents."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_shard.config import Config
from moe_shard.errors import UserError
from moe_shard.layers.causal_conv import Earlier, causal_conv
from moe_shard.layers.delta_net import GatedDeltaNet, make_delta_net
from moe_shard.layers.delta_rule import DeltaInputs, gated_delta_rule
from tests.layers import delta_oracle
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
from tests.models.build import QUICK, assert_close, label

DELTA = (
    "mixer_pattern=[gated_delta_net]", "gdn_num_key_heads=2", "gdn_num_value_heads=6",
    "gdn_key_head_dim=4", "gdn_value_head_dim=3",
    "gdn_conv_kernel_dim=3", "gdn_chunk_size=4",
)  # fmt: skip


def random_inputs(tokens: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Draw what the rule reads, the state last, and the first tokens of documents."""
    rng = np.random.default_rng(seed)
    heads, each, of_key, of_value = 2, 3, 4, 5
    query, key = rng.standard_normal((2, 2, tokens, heads, of_key))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value = rng.standard_normal((2, tokens, heads, each, of_value))
    decay = -rng.exponential(0.5, (2, tokens, heads, each))
    rate = rng.uniform(0, 1, (2, tokens, heads, each))
    state = rng.standard_normal((2, heads, each, of_key, of_value))
    begins = (rng.random((2, tokens)) < 0.15).astype(np.int32)
    begins[0] = 0  # so that the state before the first token counts
    return [query, key, value, decay, rate, state], begins


@pytest.mark.parametrize(("tokens", "chunk"), [(13, 4), (11, 16), (5, 1)])
def test_chunks_equal_the_recurrence(tokens: int, chunk: int) -> None:
    arrays, begins = random_inputs(tokens)
    rng = np.random.default_rng(1)
    probe = rng.standard_normal(arrays[2].shape)
    of_state = rng.standard_normal(arrays[5].shape)

    def loss(arrays: list[jax.Array]) -> Any:
        *read, state = arrays
        inputs = DeltaInputs(*[*read, jnp.asarray(begins)])
        y, state = gated_delta_rule(inputs, state, chunk_size=chunk)
        return jnp.sum(y * probe) + jnp.sum(state * of_state), (y, state)

    def by_token(arrays: list[np.ndarray]) -> float:
        y, state = delta_oracle.delta_rule(arrays[:5], begins, arrays[5])
        return float(np.sum(y * probe) + np.sum(state * of_state))

    narrow = [jnp.asarray(each, jnp.float32) for each in arrays]
    wide = [np.asarray(each, np.float64) for each in narrow]
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (_, found), grads = compiled(narrow)
    expected = delta_oracle.delta_rule(wide[:5], begins, wide[5])
    for got, wanted in zip(found, expected, strict=True):
        assert_close(np.asarray(got), wanted)
    assert_gradients(jax.device_get(grads), wide, by_token)


def test_equal_keys_do_not_blow_up() -> None:
    # The matrix that is inverted is then all ones below its diagonal, and its powers are binomials.
    tokens = 64
    value = random_inputs(tokens)[0][2]
    key = np.full((2, tokens, 2, 4), 0.5)
    ones = np.ones((2, tokens, 2, 3))
    begins, state = np.zeros((2, tokens), np.int32), np.zeros((2, 2, 3, 4, 5))
    inputs = [key, key, value, -1e-3 * ones, ones]
    narrow = [jnp.asarray(each, jnp.float32) for each in inputs]
    rule = jax.jit(functools.partial(gated_delta_rule, chunk_size=64))
    got, _ = rule(DeltaInputs(*[*narrow, jnp.asarray(begins)]), state)
    expected, _ = delta_oracle.delta_rule(inputs, begins, state)
    assert_close(np.asarray(got), expected)


def test_a_convolution_goes_on_where_a_call_ended() -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 9, 3)), rng.standard_normal((4, 3))
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 2, 3, 3, 3, 3, 3, 3, 3]])
    expected = delta_oracle.conv(x, kernel, segment_ids)
    found: list[jax.Array] = []
    earlier = Earlier(jnp.full((2, 3, 3), 9.0), jnp.zeros((2, 3), jnp.int32))
    jitted = jax.jit(causal_conv, compiler_options=QUICK)
    for first, last in ((0, 2), (2, 9)):
        ids = jnp.asarray(segment_ids[:, first:last])
        y, tail = jitted(x[:, first:last], kernel, ids, earlier)
        before = jnp.concatenate([earlier.segment_ids, ids], axis=1)[:, -3:]
        found, earlier = [*found, y], Earlier(tail, before)
    assert_close(np.concatenate(found, axis=1), expected)


def delta_layer(sizes: Sizes, *overrides: str) -> tuple[Config, Layer, Any]:
    """Describe a gated delta net on a mesh, and the placement of its activations."""
    config = layer_config(sizes, *DELTA, *overrides)
    sharding, kind = layer_annotator(config, sizes), config.model.layer_kinds[0]
    layer = describe(lambda rngs: make_delta_net(config.model, kind, sharding, rngs), sharding)
    place = sharding.named_sharding("x", ("activation_batch", None, None), (8, 1, 1))
    return config, layer, place


def by_oracle(config: Config, text: Text) -> Any:
    keys = config.as_flat_dict()
    return lambda params, x: delta_oracle.delta_net(x, params, text.segment_ids, keys)


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        ({}, ("use_qk_norm_in_gdn=false", "gdn_conv_kernel_dim=1")),
        ({"data": 2, "fsdp": 2, "tensor": 2}, ()),
    ],
    ids=["one-device", "data2-fsdp2-tensor2"],
)
def test_layer_equals_numpy(sizes: Sizes, overrides: tuple[str, ...]) -> None:
    config, layer, place = delta_layer(sizes, *overrides)
    text, params = packed(8 if sizes else 2), random_like(layer.shapes)
    probe = np.random.default_rng(2).standard_normal(text.x.shape)

    def call(module: GatedDeltaNet, x: jax.Array) -> jax.Array:
        return module(x, jnp.asarray(text.positions), jnp.asarray(text.segment_ids))[0]

    y, grads = value_and_grads(call, layer, params, text.x, probe, place)
    oracle, x = by_oracle(config, text), text.x.astype(np.float64)
    assert_close(y, oracle(params, x))
    assert_gradients(grads, (params, x), lambda at: float(np.sum(oracle(*at) * probe)))


def test_documents_of_a_sequence_are_apart() -> None:
    _, layer, _ = delta_layer({})
    module = nnx.merge(layer.graph, jax.tree.map(np.float32, random_like(layer.shapes)))
    text = packed(1, 11, begin=0.4)
    run = jax.jit(lambda x, ids: module(x, ids, ids)[0], compiler_options=QUICK)
    together, ids = run(text.x, text.segment_ids), text.segment_ids[0]
    assert len(set(ids)) > 3
    for document in sorted(set(ids)):
        own = ids == document
        alone = run(text.x[:, own], np.zeros((1, own.sum()), np.int32))
        np.testing.assert_allclose(alone, together[:, own], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["gdn_chunk_size=48"], "power of two"),
        (["gdn_num_key_heads=4", "gdn_num_value_heads=6"], "one of [1, 2, 3, 6]"),
    ],
)
def test_what_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        layer_config({}, *overrides)
    assert words in str(error.value)


@pytest.mark.parametrize("sizes", [{"tensor": 4}], ids=label)
def test_heads_that_the_mesh_does_not_divide(sizes: Sizes) -> None:
    with pytest.raises(UserError, match="gdn_head"):
        delta_layer(sizes)
