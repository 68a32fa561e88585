"""The gated MLP equals the oracle, outputs and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.config.model_config import GATE_ACTIVATIONS
from moe_shard.layers.activation import ACTIVATIONS, gated
from moe_shard.layers.mlp import MLP
from tests.layers import oracle
from tests.layers.build import (
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

CLAMPED = ("mlp_activations_limit=0.6", "mlp_linear_offset=1.0")
EVERYTHING = ("mlp_activations=[quick_gelu, linear]", "mlp_bias=true", *CLAMPED)
NO_GATE = ("mlp_activations=[relu2]", "mlp_bias=true")
CASES = {
    "plain": (),
    "bias": ("mlp_bias=true",),
    "offset": ("mlp_linear_offset=1.0",),
    "clamped": CLAMPED,
    "everything": EVERYTHING,
    "no gate": NO_GATE,
}
MESHES: list[Sizes] = [
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp_transpose": 2, "tensor": 2, "expert": 2},
]


def check(sizes: Sizes, overrides: tuple[str, ...], rows: int) -> None:
    config = layer_config(sizes, *overrides)
    sharding = layer_annotator(config, sizes)
    model = config.model
    layer = describe(
        lambda rngs: MLP(
            model_dim=model.emb_dim,
            hidden_dim=model.mlp_dim,
            gating=model.gating,
            dtype=model.dtype,
            weight_dtype=model.weight_dtype,
            sharding=sharding,
            rngs=rngs,
        ),
        sharding,
    )
    keys, x, params = config.as_flat_dict(), packed(rows).x, random_like(layer.shapes)
    probe = np.random.default_rng(3).standard_normal(x.shape).astype(np.float32)
    place = sharding.named_sharding(
        "x", ("activation_batch", "activation_length", "activation_embed"), x.shape
    )
    y, grads = value_and_grads(lambda module, x: module(x), layer, params, x, probe, place)
    at = (params, x.astype(np.float64))
    assert_close(y, oracle.mlp(at[1], params, keys))
    assert_gradients(
        grads, at, lambda at: float(np.sum(oracle.mlp(at[1], at[0], keys) * probe)), step=1e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_on_one_device(case: str) -> None:
    check({}, CASES[case], rows=3)


@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_on_meshes(sizes: Sizes) -> None:
    check(sizes, EVERYTHING, rows=8)


@pytest.mark.parametrize("name", GATE_ACTIVATIONS)
def test_every_activation_and_its_derivative(name: str) -> None:
    gating = layer_config({}, f"mlp_activations=[{name}, linear]").model.gating
    # No point is within a step of 0, where relu has no derivative.
    gate, up = np.linspace(-6, 6, 100), np.full(100, 1.5)

    def expected(gate: np.ndarray) -> np.ndarray:
        return oracle.ACTIVATIONS[name](gate) * 1.5

    def found(gate: jax.Array) -> jax.Array:
        return gated(gate, jnp.asarray(up, jnp.float32), gating)

    narrow = jnp.asarray(gate, jnp.float32)
    assert_close(found(narrow), expected(gate), 1e-6)
    slope = jax.grad(lambda gate: jnp.sum(found(gate)))(narrow)
    assert_close(slope, (expected(gate + 1e-6) - expected(gate - 1e-6)) / 2e-6, 1e-5)


def test_the_configuration_knows_the_activations_that_are_built() -> None:
    assert set(ACTIVATIONS) == set(GATE_ACTIVATIONS) == set(oracle.ACTIVATIONS)


def test_gate_is_clamped_from_above_and_up_on_both_sides_before_the_offset() -> None:
    # GPT-OSS: limit 7, up + 1, x * sigmoid(1.702 x). relu shows the clamp of the gate alone.
    gating = layer_config(
        {},
        "mlp_activations=[relu, linear]",
        "mlp_activations_limit=7",
        "mlp_linear_offset=1",
    ).model.gating
    gate = jnp.asarray([9.0, 9.0, 3.0, -9.0], jnp.float32)
    up = jnp.asarray([9.0, -9.0, 2.0, 9.0], jnp.float32)
    np.testing.assert_array_equal(gated(gate, up, gating), [7 * 8, 7 * -6, 3 * 3, 0])
