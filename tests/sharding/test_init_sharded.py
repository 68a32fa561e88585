"""Create variables on their devices: their shardings, what is preserved, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import moe_shard as ms

MOE = ms.MoEConfig(num_experts=8, num_experts_per_tok=2, moe_mlp_dim=16)
SHARDING = ms.Sharding(ms.make_mesh(data=2, expert=4), rule_conflicts="record")
OTHER = ms.Sharding(ms.make_mesh(expert=8))


def moe(rngs: nnx.Rngs, sharding: ms.Sharding = SHARDING) -> ms.MoELayer:
    return ms.MoELayer(MOE, model_dim=8, sharding=sharding, rngs=rngs)


class Stateful(nnx.Module):
    """Hold statistics, random-number counters, and the same rngs object that it gets."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.rngs = rngs
        self.moe = moe(rngs)


def test_values_and_counters_are_those_of_the_plain_model() -> None:
    plain = Stateful(one := nnx.Rngs(params=0, dropout=1))
    model = ms.init_sharded(Stateful, rngs=(other := nnx.Rngs(params=0, dropout=1)))
    found, expected = (dict(nnx.to_flat_state(nnx.state(each))) for each in (model, plain))
    assert set(found) == set(expected)
    for path, variable in expected.items():
        assert type(found[path]) is type(variable)
        if not jnp.issubdtype(variable.get_value().dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(found[path][...], variable[...], rtol=1e-6, err_msg=path)
    assert model.rngs is other
    np.testing.assert_array_equal(
        jax.random.key_data(other.params()), jax.random.key_data(one.params())
    )
    np.testing.assert_array_equal(model.dropout(jnp.ones((4, 8))), plain.dropout(jnp.ones((4, 8))))


def test_rngs_that_the_model_does_not_keep_can_be_used_anywhere() -> None:
    ms.init_sharded(moe, rngs=(rngs := nnx.Rngs(0)))
    assert not rngs.params().committed


def test_flaxs_own_tools_read_the_names() -> None:
    specs: Any = nnx.get_partition_spec(nnx.state(moe(nnx.Rngs(0))))
    assert specs["experts"]["gate"].get_value() == jax.P("exp", "embed_moe", "mlp_moe")
    assert specs["router"]["kernel"].get_value() == jax.P("embed_router", "exp_router")
    linen = nnx.bridge.to_linen(ms.MoELayer, MOE, model_dim=8, sharding=SHARDING)
    variables = jax.eval_shape(lambda: linen.init(jax.random.key(0), jnp.ones((8, 4, 8))))
    of_linen: Any = nn.get_partition_spec(variables)
    assert of_linen["params"]["experts"]["down"] == jax.P("exp", "mlp_moe", "embed_moe")


def named(names: Any, *shape: int, **metadata: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.moe = moe(rngs)
            self.w = nnx.Param(jnp.zeros(shape), out_sharding=names, **metadata)

    return Model


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (named(("pixels",), 4), ["'pixels' of w", "['pixels', []]"]),
        (named(("embed",), 4, 4), ["w: 2 dims (4, 4) have 1 names", "nnx.PARTITION_NAME"]),
        (named(("embed",), 6), ["'embed' of size 6", "expert=4"]),
        (named((("data", "expert"),), 8), ["w: its dims are named", "one logical axis, or None"]),
        (named(("embed",), 8, sharding_rules=(("embed", "data"),)), ["w: it has rules of its own"]),
        (lambda rngs: nnx.Linear(4, 4, rngs=rngs), ["no module", "sharding=Sharding(mesh, rules)"]),
        (lambda rngs: (moe(rngs), moe(rngs, OTHER)), ["two different shardings", "expert=8"]),
    ],
)
def test_what_is_refused(build: Any, parts: list[str]) -> None:
    with pytest.raises(ms.UserError) as raised:
        ms.init_sharded(build, rngs=nnx.Rngs(0))
    for part in parts:
        assert part in str(raised.value), raised.value
    assert len(str(raised.value).splitlines()) <= 3


def test_a_sharding_that_differs_from_the_models_is_refused() -> None:
    with pytest.raises(ms.UserError, match="two different shardings"):
        ms.init_sharded(moe, rngs=nnx.Rngs(0), sharding=OTHER)
    linear = ms.init_sharded(
        lambda rngs: nnx.Linear(4, 4, rngs=rngs), rngs=nnx.Rngs(0), sharding=OTHER
    )
    assert linear.kernel[...].sharding.is_fully_replicated  # it has no logical axes


def test_arrays_from_outside_on_explicit_axes_are_refused() -> None:
    mesh = ms.make_mesh(expert=8, explicit=True)
    with jax.set_mesh(mesh):
        scale = jnp.ones((4,))

        def build(rngs: nnx.Rngs) -> nnx.Module:
            linear = nnx.Linear(4, 4, rngs=rngs)
            linear.kernel.set_value(linear.kernel[...] * scale)
            return linear

        with pytest.raises(ms.UserError, match="make arrays inside of build"):
            ms.init_sharded(build, rngs=nnx.Rngs(0), sharding=ms.Sharding(mesh))
