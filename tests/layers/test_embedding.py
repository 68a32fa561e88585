"""Lookup and logits equal the oracle, outputs and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_shard.layers.embedding import Embedding
from tests.layers import oracle
from tests.layers.build import (
    Layer,
    Sizes,
    assert_gradients,
    describe,
    layer_annotator,
    layer_config,
    packed,
    random_like,
    value_and_grads,
)
from tests.models.build import assert_close, label

CASES = {
    "plain": (),
    "tied": ("logits_via_embedding=true",),
    "bias": ("logits_bias=true",),
    "scaling": ("logits_scaling=8",),
    "soft-cap": ("final_logits_soft_cap=1.5",),
    "multiplier": ("embedding_multiplier=12",),
}
EVERYTHING = ("logits_bias=true", "logits_scaling=0.5", "final_logits_soft_cap=1.5")
MESHES: list[Sizes] = [{}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


def check(sizes: Sizes, overrides: tuple[str, ...], rows: int) -> None:
    config = layer_config(sizes, *overrides)
    sharding = layer_annotator(config, sizes)
    layer = describe(lambda rngs: Embedding(config.model, sharding, rngs=rngs), sharding)
    keys, x, params = config.as_flat_dict(), packed(rows).x, random_like(layer.shapes)
    vocab = config.model.vocab_size
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, vocab, x.shape[:2])
    probe = rng.standard_normal((*x.shape[:2], vocab)).astype(np.float32)
    place = sharding.named_sharding(
        "x", ("activation_batch", "activation_length", "activation_embed"), x.shape
    )

    def function(module: Embedding, x: jax.Array) -> jax.Array:
        return module.logits(x + module.embed(jnp.asarray(tokens)))

    def forward(at: tuple[Any, np.ndarray]) -> np.ndarray:
        looked_up = at[0]["table"][tokens] * keys["embedding_multiplier"]
        return oracle.logits(at[1] + looked_up, at[0], keys)

    y, grads = value_and_grads(function, layer, params, x, probe, place)
    assert y.dtype == np.float32
    at = (params, x.astype(np.float64))
    assert_close(y, forward(at))
    assert_gradients(grads, at, lambda at: float(np.sum(forward(at) * probe)))


@pytest.mark.parametrize("case", CASES)
def test_on_one_device(case: str) -> None:
    check({}, CASES[case], rows=3)


@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_together_on_meshes(sizes: Sizes) -> None:
    check(sizes, (*EVERYTHING, "embedding_multiplier=3"), rows=8)


def test_what_is_off_leaves_no_trace_in_the_program() -> None:
    config = layer_config({})
    sharding = layer_annotator(config, {})
    layer: Layer = describe(lambda rngs: Embedding(config.model, sharding, rngs=rngs), sharding)
    program = jax.make_jaxpr(lambda p, x: nnx.merge(layer.graph, p).logits(x))(
        layer.shapes, packed(1).x
    )
    assert {"mul", "div", "tanh", "add"}.isdisjoint(str(e.primitive) for e in program.eqns)
