"""The line of a constraint is that of who asks for it, not of the function it is asked through."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_shard.lowering.collectives import extract_collectives
from moe_shard.lowering.hlo import HloParseError, parse_module


def constrain(x: jax.Array, *spec: str | None) -> jax.Array:
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def constrain_weight(x: jax.Array, *spec: str | None) -> jax.Array:
    return constrain(x, *spec)


def layer(x: jax.Array, w: jax.Array) -> jax.Array:
    w = constrain_weight(w, None, None)
    return constrain(jnp.tanh(x @ w), None, "expert")


def text_of(function: Any) -> str:
    mesh = Mesh(jax.devices(), ("expert",))
    split = NamedSharding(mesh, PartitionSpec("expert", None))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
    return jax.jit(function).lower(x, x).compile().as_text() or ""


@pytest.fixture(scope="module")
def text() -> str:
    return text_of(jax.grad(lambda x, w: layer(x, w).sum(), argnums=(0, 1)))


def test_a_constraint_is_placed_where_a_layer_asks_for_it(text: str) -> None:
    lines, first = inspect.getsourcelines(layer)
    wanted = first + next(i for i, line in enumerate(lines) if "constrain_weight" in line)
    gathers = [each for each in extract_collectives(text).collectives if each.kind == "all-gather"]
    constraints = [each for each in gathers if each.op_name.endswith("sharding_constraint")]
    assert constraints
    assert {each.source for each in constraints} == {f"{__file__}:{wanted}"}


def test_everything_else_is_placed_where_it_stands(text: str) -> None:
    module = parse_module(text)
    lines, first = inspect.getsourcelines(layer)
    product = first + next(i for i, line in enumerate(lines) if "x @ w" in line)
    found = {
        module.source(computation.instruction(name))
        for computation in module.computations.values()
        for name, opcode in computation.opcodes.items()
        if opcode == "dot"
    }
    assert found == {f"{__file__}:{product}"}


def test_frames_that_call_each_other_are_damage(text: str) -> None:
    module = parse_module(text)
    rows = module.tables["StackFrames"]
    rows[:] = [f"{row.split(' parent_frame_id')[0]} parent_frame_id=2}}" for row in rows]
    constraint = next(
        computation.instruction(name)
        for computation in module.computations.values()
        for name in computation.opcodes
        if computation.instruction(name).op_name.endswith("sharding_constraint")
    )
    with pytest.raises(HloParseError, match="contains itself: the text is damaged"):
        module.source(constraint)
