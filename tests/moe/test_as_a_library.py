"""Call the layer as a library: Explicit axes against the oracle, and under every transform."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_shard as ms
from tests.moe.oracle import Settings, moe_layer

CONFIG = ms.MoEConfig(
    num_experts=8, num_experts_per_tok=2, moe_mlp_dim=16, moe_dispatch_no_expert_sharding=True
)
MODEL = 8
NAMES = {"kernel": ("router", "kernel"), **{n: ("experts", n) for n in ("gate", "up", "down")}}


@contextlib.contextmanager
def mesh_of(sizes: dict[str, Any]) -> Iterator[jax.sharding.Mesh]:
    """Make a mesh, and set it as the current one where its axes are Explicit, as JAX requires."""
    mesh = ms.make_mesh(**sizes)
    with jax.set_mesh(mesh) if sizes.get("explicit") else contextlib.nullcontext():
        yield mesh


def make(mesh: jax.sharding.Mesh, config: ms.MoEConfig = CONFIG) -> ms.MoELayer:
    sharding = ms.Sharding(mesh)
    return ms.init_sharded(
        lambda rngs: ms.MoELayer(config, model_dim=MODEL, sharding=sharding, rngs=rngs),
        rngs=nnx.Rngs(0),
    )


def value(tree: Any, path: tuple[str, str]) -> np.ndarray:
    return np.asarray(getattr(getattr(tree, path[0]), path[1])[...])


@pytest.mark.parametrize(
    ("sizes", "dispatch"),
    [
        ({"expert": 8}, "gather"),
        ({"data": 2, "expert": 4}, "einsum"),
        ({"data": 2, "expert": 4}, "ragged"),
    ],
)
def test_explicit_axes_against_float64(sizes: dict[str, int], dispatch: Any) -> None:
    random = np.random.default_rng(0)
    x, cotangent = (random.normal(size=(8, 4, MODEL)).astype(np.float32) for _ in range(2))
    with mesh_of({**sizes, "explicit": True}) as mesh:
        layer = make(mesh, dataclasses.replace(CONFIG, moe_dispatch=dispatch))

        def total(layer: ms.MoELayer, x: jax.Array) -> tuple[jax.Array, Any]:
            y, stats = layer(x)
            batch = ("data", "expert") if "data" in sizes else "expert"
            assert jax.typeof(y).sharding.spec[0] == batch
            assert jax.typeof(stats.dropped).sharding.spec[0] == batch
            return jnp.sum(y * jax.sharding.reshard(cotangent, jax.typeof(y).sharding)), (y, stats)

        run = jax.jit(nnx.grad(total, argnums=(0, 1), has_aux=True))
        (by_layer, by_x), (y, stats) = run(layer, x)
    params = {name: value(layer, path) for name, path in NAMES.items()}
    expected = moe_layer(x, params, cotangent, Settings(capacity_factor=-1))
    assert expected.margin > 1e-5, "a tie would be decided by rounding"
    np.testing.assert_allclose(np.asarray(y), expected.y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(stats.expert_counts), expected.counts)
    np.testing.assert_allclose(np.asarray(by_x), expected.grads["x"], rtol=1e-4, atol=1e-5)
    for name, path in NAMES.items():
        found = getattr(getattr(by_layer, path[0]), path[1])[...]
        assert found.sharding == getattr(getattr(layer, path[0]), path[1])[...].sharding
        np.testing.assert_allclose(
            np.asarray(found), expected.grads[name], rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("forced", [False, True])
def test_padding_where_axes_are_explicit(forced: bool) -> None:
    x = np.random.default_rng(0).normal(size=(8, 4, MODEL)).astype(np.float32)
    real = np.arange(4) < np.array([4, 1, 2, 3] * 2)[:, None]
    found = {}
    for explicit in (False, True):
        with mesh_of({"data": 2, "expert": 4, "explicit": explicit}) as mesh:
            router = dataclasses.replace(CONFIG.router, force_load_balance=forced)
            layer = make(mesh, dataclasses.replace(CONFIG, router=router))
            found[explicit] = jax.device_get(jax.jit(layer)(x, real=real))
    jax.tree.map(np.testing.assert_array_equal, *found.values())
    stats = found[True][1]
    assert int(stats.expert_counts.sum()) == 2 * (real.size if forced else real.sum())


class Stack(nnx.Module):
    """Apply layers with stacked parameters, then one layer with another configuration."""

    def __init__(self, sharding: ms.Sharding, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=2)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def many(rngs: nnx.Rngs) -> ms.MoELayer:
            return ms.MoELayer(CONFIG, model_dim=MODEL, sharding=sharding, rngs=rngs)

        self.many = many(rngs)
        other = ms.MoEConfig(num_experts=16, num_experts_per_tok=1, moe_mlp_dim=16)
        self.last = ms.MoELayer(
            dataclasses.replace(other, moe_dispatch="ragged"),
            model_dim=MODEL,
            sharding=sharding,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        graph, params = nnx.split(self.many)

        def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return x + nnx.merge(graph, params)(x)[0], None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, params)
        return x + self.last(x)[0]


@pytest.mark.parametrize("explicit", [False, True])
def test_scan_checkpoint_and_two_configurations(explicit: bool) -> None:
    with mesh_of({"data": 2, "expert": 4, "explicit": explicit}) as mesh:
        sharding = ms.Sharding(mesh)
        model = ms.init_sharded(lambda rngs: Stack(sharding, rngs), rngs=nnx.Rngs(0))
        stacked: Any = model.many.experts.gate[...].sharding
        assert stacked.spec == jax.P(None, "expert", None, None)
        assert model.last.experts.gate.shape == (16, MODEL, 16)
        x = sharding(jnp.ones((8, 4, MODEL)), "activation_batch_moe", None, None, name="x")
        grads = nnx.jit(nnx.grad(lambda model, x: jnp.mean(model(x) ** 2)))(model, x)
        for path, each in nnx.to_flat_state(nnx.state(model)):
            found = dict(nnx.to_flat_state(nnx.state(grads)))[path]
            assert np.isfinite(np.asarray(found[...])).all()
            assert found[...].sharding.is_equivalent_to(each[...].sharding, each[...].ndim), path


def test_an_equal_layer_does_not_compile_again() -> None:
    traces = []

    @nnx.jit
    def apply(layer: ms.MoELayer, x: jax.Array) -> jax.Array:
        traces.append(layer.config)
        return layer(x)[0]

    x = jnp.ones((8, 4, MODEL))
    first, second = (apply(make(ms.make_mesh(expert=8)), x) for _ in range(2))
    assert len(traces) == 1
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    apply(make(ms.make_mesh(data=8)), x)
    assert len(traces) == 2
