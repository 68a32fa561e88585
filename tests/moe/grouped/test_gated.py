"""Compare the experts' MLPs with gate and up as one grouped product with float64 NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_shard.config.model_config import GatingConfig
from moe_shard.layers.activation import ACTIVATIONS
from moe_shard.moe.grouped import GroupedProduct, can_fuse, choose, grouped_mlp
from moe_shard.moe.grouped.gated import GroupedMLP
from tests.moe.grouped import oracle

IN, OUT = 24, 40
ROUTINES = {
    "blocked": GroupedProduct("blocked", 8, "a test"),
    "pallas": GroupedProduct("pallas", 16, "a test"),
}
FILLS = {
    "balanced": ((32, 32, 32, 32), 128),
    "an empty group": ((48, 0, 64, 16), 128),
    "one group has all": ((0, 0, 128, 0), 128),
    "all empty": ((0, 0, 0, 0), 128),
    "partly filled": ((16, 0, 32, 16), 128),
}
each_routine = pytest.mark.parametrize("name", ROUTINES)


def arrays(
    sizes: tuple[int, ...], rows: int, *, biased: bool, dtype: str = "float32", dims: Any = None
) -> tuple[Any, ...]:
    random = np.random.default_rng(3)
    into, out = dims or (IN, OUT)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * random.normal(size=shape), dtype)

    x = normal(rows, into).at[sum(sizes) :].set(1e3)
    gate, up = (normal(len(sizes), into, out, scale=into**-0.5) for _ in range(2))
    weights = (gate, up, normal(len(sizes), out, into, scale=out**-0.5))
    biases = tuple(normal(len(sizes), out) for _ in range(2)) if biased else ()
    return x, weights, biases, jnp.asarray(sizes, jnp.int32), normal(rows, into)


def outputs(using: GroupedProduct, gating: GatingConfig) -> Any:
    def run(x: Any, weights: Any, biases: Any, sizes: Any, dy: Any) -> tuple[Any, ...]:
        def apply(x: Any, weights: Any, biases: Any) -> Any:
            each = GroupedMLP(weights[0], weights[1], weights[2], biases)
            return grouped_mlp(x, each, sizes, gating=gating, using=using, platform="cpu")

        y, pullback = jax.vjp(apply, x, weights, biases)
        return (y, *pullback(dy))

    return run


def compare(found: Any, given: Any, gating: GatingConfig, tolerance: float = 1e-5) -> None:
    limit, offset = gating.mlp_activations_limit, gating.mlp_linear_offset
    answer = oracle.mlp(*given, act=gating.activation, limit=limit, offset=offset)
    y, dx, by_weights, by_biases = found
    own = slice(answer.rows)
    expected = [answer.y[own], answer.dx[own], *answer.by_weights, *answer.by_biases]
    results = [y[own], dx[own], *by_weights, *by_biases]
    for one, other in zip(results, expected, strict=True):
        one = np.asarray(one, np.float64)
        assert one.shape == other.shape
        if other.size:
            assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), 1e-30)
    # Rows past the groups are zeros, forward and backward.
    assert not np.asarray(y[answer.rows :], np.float64).any()
    assert not np.asarray(dx[answer.rows :], np.float64).any()


@each_routine
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("fill", FILLS)
def test_equals_the_loop_over_groups(name: str, fill: str, biased: bool) -> None:
    given = arrays(*FILLS[fill], biased=biased)
    compare(jax.jit(outputs(ROUTINES[name], GatingConfig()))(*given), given, GatingConfig())


@each_routine
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_clamp_and_offset(name: str, activation: str) -> None:
    gating = GatingConfig(
        mlp_activations=(activation, "linear"),
        mlp_activations_limit=1.5,
        mlp_linear_offset=1.0,
        mlp_bias=True,
    )
    given = arrays((48, 0, 64, 16), 144, biased=True)
    compare(jax.jit(outputs(ROUTINES[name], gating))(*given), given, gating)


@each_routine
def test_bfloat16(name: str) -> None:
    given = arrays((48, 0, 64, 16), 128, biased=True, dtype="bfloat16")
    found = jax.jit(outputs(ROUTINES[name], GatingConfig()))(*given)
    assert {each.dtype for each in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    compare(found, given, GatingConfig(), 1e-2)


@pytest.mark.parametrize("dims", [(96, 200), (130, 10)])
def test_the_kernel_where_tiles_reach_over_the_edges(dims: tuple[int, int]) -> None:
    given = arrays((96, 0, 32, 128), 288, biased=True, dims=dims)
    using = GroupedProduct("pallas", 32, "a test")
    compare(jax.jit(outputs(using, GatingConfig()))(*given), given, GatingConfig())


@each_routine
def test_the_same_bits_every_run(name: str) -> None:
    given = arrays((48, 0, 64, 16), 128, biased=True)
    run = jax.jit(outputs(ROUTINES[name], GatingConfig()))
    for one, other in zip(*map(jax.tree.leaves, (run(*given), run(*given))), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@each_routine
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(name: str, check_vma: bool) -> None:
    """Rows are split over one axis and groups over the other: gradients are sums over these."""
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    random = np.random.default_rng(7)
    both, rows, groups = P(("data", "expert")), 64, 3
    sizes = jnp.asarray(16 * random.integers(0, 2, size=8 * groups), jnp.int32)
    x = jnp.asarray(random.normal(size=(2 * rows, IN)), jnp.float32)
    weights = tuple(
        jnp.asarray(random.normal(size=(4 * groups, *dims)), jnp.float32)
        for dims in ((IN, OUT), (IN, OUT), (OUT, IN))
    )
    biases = tuple(jnp.asarray(random.normal(size=(4 * groups, OUT)), jnp.float32) for _ in "ab")
    dy = jnp.asarray(random.normal(size=(8 * rows, IN)), jnp.float32)
    gating = GatingConfig()

    def loss(x: Any, weights: Any, biases: Any) -> Any:
        def on_device(x: Any, weights: Any, biases: Any, sizes: Any, dy: Any) -> Any:
            each = GroupedMLP(weights[0], weights[1], weights[2], biases)
            y = grouped_mlp(x, each, sizes, gating=gating, using=ROUTINES[name], platform="cpu")
            return jax.lax.psum(jnp.sum(y * dy), ("data", "expert"))

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(P("data"), P("expert"), P("expert"), both, both),
            out_specs=P(),
            check_vma=check_vma,
        )(x, weights, biases, sizes, dy)

    dx, by_weights, by_biases = jax.jit(jax.grad(loss, (0, 1, 2)))(x, weights, biases)
    expected = [np.zeros(each.shape) for each in (x, *weights, *biases)]
    for data in range(2):
        for expert in range(4):
            at = data * 4 + expert
            row, group = (
                slice(data * rows, (data + 1) * rows),
                slice(expert * groups, (expert + 1) * groups),
            )
            answer = oracle.mlp(
                x[row],
                [each[group] for each in weights],
                [each[group] for each in biases],
                sizes[at * groups : (at + 1) * groups],
                dy[at * rows : (at + 1) * rows],
                act="silu",
                limit=-1,
                offset=0,
            )
            expected[0][row] += answer.dx
            for into, one in zip(
                expected[1:], [*answer.by_weights, *answer.by_biases], strict=True
            ):
                into[group] += one
    found = [dx, *by_weights, *by_biases]
    for one, other in zip(found, expected, strict=True):
        assert np.abs(np.asarray(one, np.float64) - other).max() <= 1e-5 * np.abs(other).max()


def results_of_kernels(jaxpr: Any, name: str) -> list[int]:
    """Return how many arrays each kernel of this name writes, wherever it is called."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found += [len(equation.outvars)] * (equation.params["name"] == name)
            continue
        for inner in jaxprs_in_params(equation.params):
            found += results_of_kernels(getattr(inner, "jaxpr", inner), name)
    return sorted(found)


def test_gate_and_up_are_written_where_there_are_gradients() -> None:
    x, weights, _, sizes, _ = arrays((48, 0, 64, 16), 128, biased=False)
    each, using = GroupedMLP(weights[0], weights[1], weights[2], ()), ROUTINES["pallas"]

    def loss(x: Any) -> Any:
        y = grouped_mlp(x, each, sizes, gating=GatingConfig(), using=using, platform="cpu")
        return jnp.sum(y)

    assert results_of_kernels(jax.make_jaxpr(loss)(x).jaxpr, "grouped_gated") == [1]
    assert results_of_kernels(jax.make_jaxpr(jax.grad(loss))(x).jaxpr, "grouped_gated") == [3]


def test_a_kernel_has_no_error_function() -> None:
    gating = GatingConfig(mlp_activations=("gelu_exact", "linear"))
    assert not can_fuse(ROUTINES["pallas"], gating)
    assert can_fuse(ROUTINES["pallas"], GatingConfig())
    assert can_fuse(ROUTINES["blocked"], gating)


def test_the_routine_says_why_it_does_not() -> None:
    for platform, says in (("tpu", "lax.ragged_dot multiplies by one"), ("cuda", ""), ("cpu", "")):
        using = choose("auto", platform=platform, groups=8, rows=4096, dtype=jnp.bfloat16)
        assert using.why_not_gated.startswith(says)
        assert bool(using.why_not_gated) == bool(says)
    assert choose("auto", platform="cuda", groups=1, rows=8, dtype=jnp.bfloat16).why_not_gated
