"""Report a wrong third-party strategy in one error that names it, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moe_shard as ms
from moe_shard.config.strategies import unregister_strategy
from moe_shard.moe.dispatch.gather import Gather

TOKENS = (8, 16, 32)


@pytest.fixture
def register() -> Iterator[Callable[[Any], None]]:
    """Register a class as `mine`, and unregister it afterwards."""
    yield lambda made: ms.register_strategy("mine", has_slots=True)(made) and None
    unregister_strategy("mine")


def make(dispatch: str = "mine", **more: Any) -> ms.MoELayer:
    config = ms.MoEConfig(
        num_experts=8,
        num_experts_per_tok=2,
        moe_mlp_dim=16,
        moe_dispatch=dispatch,
        moe_dispatch_no_expert_sharding=True,
    )
    sharding = ms.Sharding(ms.make_mesh(data=2, expert=4), ms.RuleTable.default())
    return ms.MoELayer(config, model_dim=32, sharding=sharding, rngs=nnx.Rngs(0), **more)


def shapes_of(layer: ms.MoELayer, dtype: Any = jnp.float32) -> Any:
    return jax.eval_shape(lambda layer, x: layer(x), layer, jax.ShapeDtypeStruct(TOKENS, dtype))


class NoRecord:
    """Omit `record`."""

    def __init__(self, config: Any, placement: Any) -> None: ...

    def __call__(self, x: Any, routing: Any, experts: Any) -> Any: ...


def test_a_missing_method_is_named_when_the_layer_is_made(
    register: Callable[[Any], None],
) -> None:
    register(NoRecord)
    with pytest.raises(ms.UserError, match="mine: NoRecord has no record\nfix: both"):
        make()
    ms.register_strategy("mine", has_slots=True)(lambda *_: None)
    with pytest.raises(ms.UserError, match="mine: NoneType has no __call__ and no record"):
        make()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda y, _: y, "one array\nfix: a tuple of output and dropped"),
        (
            lambda y, dropped: (y.astype(jnp.bfloat16), dropped),
            r"an output \[8, 16, 32\] bfloat16\nfix: \[8, 16, 32\] float32, as its input",
        ),
        (lambda y, dropped: (y.reshape(-1, 32), dropped), r"an output \[128, 32\] float32"),
        (lambda _, dropped: (None, dropped), "an output of type NoneType"),
        (
            lambda y, dropped: (y, dropped.sum()),
            r"dropped choices \[\] int32\nfix: \[8\] int32: a number for each sequence",
        ),
        (lambda y, dropped: (y, dropped * 1.0), r"dropped choices \[8\] float32"),
        (lambda y, _: (y, None), "dropped choices of type NoneType"),
    ],
)
def test_a_wrong_result_is_named(
    change: Callable[..., Any], says: str, register: Callable[[Any], None]
) -> None:
    class Mine(Gather):
        def __call__(self, *args: Any) -> Any:
            return change(*super().__call__(*args))

    register(Mine)
    layer = make()
    with pytest.raises(ms.UserError, match=f"moe_dispatch=mine returned {says}"):
        shapes_of(layer)


def test_slots_in_another_order_are_named(register: Callable[[Any], None]) -> None:
    class Mine(Gather):
        def dispatch(self, x: Any, slots: Any, num_experts: int) -> Any:
            return super().dispatch(x, slots, num_experts).swapaxes(1, 2)

    register(Mine)
    layer = make()
    expected = r"dispatch returned \[8, 16, 8, 32\]\nfix: \[8, 8, 16, 32\]: experts, sequences"
    with pytest.raises(ms.UserError, match=expected):
        shapes_of(layer)


def test_a_narrower_product_may_return_the_wider_dtype() -> None:
    assert shapes_of(make("gather", dtype=jnp.bfloat16))[0].dtype == jnp.float32
    assert shapes_of(make("gather"), jnp.bfloat16)[0].dtype == jnp.float32


def test_ragged_names_the_dtypes_that_it_cannot_multiply() -> None:
    layer = make("ragged", dtype=jnp.bfloat16)
    with pytest.raises(ms.UserError, match="copies are float32 and the experts' weights bfloat16"):
        shapes_of(layer)
