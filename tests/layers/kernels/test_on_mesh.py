"""Attention on every mesh equals NumPy, with keys gathered or passed round a ring, in any order."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.layers.kernels import blockwise, splash, triton_attention
from moe_shard.layers.kernels.on_mesh import AttentionShards, attend_on_mesh
from moe_shard.layers.kernels.ring import ring_attend
from moe_shard.layers.kernels.rule import AttentionRule, Tokens
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.mesh import make_mesh
from tests.layers.kernels.numbers import Gradients, Problem, make_problem, solve
from tests.models.build import QUICK, assert_close, label

AXES = ("data", "fsdp", "tensor", "context")
MESHES: list[dict[str, int]] = [
    {axis: size for axis, size in zip(AXES, sizes, strict=True) if size > 1}
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if np.prod(sizes) == 8
]
ROWS, TOKENS = 8, 32


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(
        rows=ROWS, tokens=TOKENS, heads=8, kv_heads=8, sink=True, cap=2.0, span="sliding", window=13
    )


@pytest.fixture(scope="module")
def solution(problem: Problem) -> tuple[np.ndarray, Gradients]:
    return solve(problem)


def check(
    problem: Problem,
    solution: Any,
    sizes: dict[str, int],
    strategy: Any,
    orders: list[Any],
    attend: Any = None,
    *,
    check_vma: bool = True,
) -> None:
    """Compare with the solution, for tokens in each of these orders."""
    sharding = Sharding(make_mesh(**sizes))  # type: ignore[arg-type]
    shapes = problem.query.shape, problem.key.shape
    shards = AttentionShards.of(
        sharding, *shapes, key_length="activation_length", strategy=strategy
    )
    assert shards.is_ring == (strategy == "ring")
    rule = AttentionRule(
        scale=problem.scale,
        soft_cap=problem.cap,
        span=problem.span,  # type: ignore[arg-type]
        window=max(problem.keys.values()),
    )
    attend = attend or partial(ring_attend if shards.is_ring else blockwise.attend, largest_block=4)
    spec = jax.sharding.NamedSharding(sharding.mesh, shards.query_spec)
    key_spec = jax.sharding.NamedSharding(sharding.mesh, shards.key_spec)
    free = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())

    def loss(arrays: Any, probe: Any, tokens: Tokens) -> Any:
        query, key, value, sink = arrays
        out = attend_on_mesh(
            attend,
            query,
            key,
            value,
            tokens,
            tokens,
            rule=rule,
            sink=sink,
            shards=shards,
            check_vma=check_vma,
        )
        return jnp.sum(out * probe), out

    places = (spec, key_spec, key_spec, free)
    jitted = jax.jit(
        jax.value_and_grad(loss, has_aux=True),
        in_shardings=(places, spec, Tokens(free, free, free)),  # type: ignore[arg-type]
        out_shardings=((None, spec), places),
        compiler_options=QUICK,
    )
    for order in orders:
        arrays = [
            np.asarray(x, np.float32)[:, order]
            for x in (problem.query, problem.key, problem.value, problem.probe)
        ]
        assert problem.sink is not None
        sink = np.asarray(problem.sink, np.float32)
        tokens = Tokens(
            jnp.asarray(problem.positions[:, order]),
            jnp.asarray(problem.segment_ids[:, order]),
            order,
        )
        (_, out), found = jitted((*arrays[:3], sink), arrays[3], tokens)
        expected, gradients = solution
        assert_close(out, expected[:, order])
        for name, gradient in zip(Gradients._fields, found, strict=True):
            whole = getattr(gradients, name)
            assert_close(gradient, whole if name == "sink" else whole[:, order])


@pytest.mark.parametrize("name", ["blockwise", "triton", "splash"])
def test_an_order_that_is_known_at_tracing(problem: Problem, solution: Any, name: str) -> None:
    # As a step has it, for kernels that know no positions too.
    sharding = Sharding(make_mesh(context=2, tensor=4))
    shards = AttentionShards.of(
        sharding,
        problem.query.shape,
        problem.key.shape,
        key_length="activation_length",
        strategy="all_gather",
    )
    attend = {
        "blockwise": partial(blockwise.attend, largest_block=4),
        "triton": partial(triton_attention.attend, platform="cpu"),
        "splash": partial(splash.attend, interpret=True),
    }[name]
    order = orders(2)[1]
    query, key, value, probe = (
        np.asarray(x, np.float32)[:, order]
        for x in (problem.query, problem.key, problem.value, problem.probe)
    )
    tokens = Tokens(
        jnp.asarray(problem.positions[:, order]), jnp.asarray(problem.segment_ids[:, order]), order
    )
    rule = AttentionRule(
        scale=problem.scale, soft_cap=problem.cap, span="sliding", window=max(problem.keys.values())
    )

    def loss(query: Any, key: Any, value: Any, sink: Any) -> Any:
        out = attend_on_mesh(
            attend,
            query,
            key,
            value,
            tokens,
            tokens,
            rule=rule,
            sink=sink,
            shards=shards,
            check_vma=name == "blockwise",
        )
        return jnp.sum(out * probe), out

    jitted = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK
    )
    (_, out), found = jitted(query, key, value, np.asarray(problem.sink, np.float32))
    expected, gradients = solution
    assert_close(out, expected[:, order])
    for which, gradient in zip(("query", "key", "value"), found, strict=True):
        assert_close(gradient, getattr(gradients, which)[:, order])


def test_the_meshes_are_all_there_are() -> None:
    assert len(MESHES) == 20


def orders(parts: int) -> list[Any]:
    """Return the order of the text, and one in which each device has an early and a late chunk."""
    plain = np.arange(TOKENS, dtype=np.int32)
    chunks = plain.reshape(2 * parts, -1)
    zigzag = [chunk for part in range(parts) for chunk in (chunks[part], chunks[-1 - part])]
    return [plain, np.concatenate(zigzag)]


@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_gathered(problem: Problem, solution: Any, sizes: dict[str, int]) -> None:
    check(problem, solution, sizes, "all_gather", orders(sizes.get("context", 1)))


@pytest.mark.parametrize("sizes", [each for each in MESHES if "context" in each], ids=label)
def test_round_a_ring(problem: Problem, solution: Any, sizes: dict[str, int]) -> None:
    check(problem, solution, sizes, "ring", orders(sizes["context"]))
