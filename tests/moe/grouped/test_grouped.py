"""Compare every routine that a CPU can run with a loop over groups in float64."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_shard.config.moe_config import GroupedProductName
from moe_shard.errors import UserError
from moe_shard.lowering.collectives import extract_collectives
from moe_shard.lowering.work import flops_by_scope
from moe_shard.moe.grouped import (
    GroupedProduct,
    choose,
    grouped_product,
    tpu_kernel,
)
from moe_shard.moe.grouped.blocks import product
from moe_shard.moe.grouped.ragged_dot import OnTpu
from moe_shard.sharding.varying import vary_alike
from tests.moe.grouped.oracle import Answer, grouped

IN, OUT = 24, 40
# `ragged_dot` as it is composed for a TPU, with its kernel in the interpreter.
ON_TPU = GroupedProduct("ragged_dot", 1, "a TPU")
ROUTINES = {
    "ragged_dot on a TPU": ON_TPU,
    "ragged_dot": GroupedProduct("ragged_dot", 1, "a test"),
    "blocked": GroupedProduct("blocked", 8, "a test"),
    "pallas": GroupedProduct("pallas", 16, "a test"),
}
# In units of 16 rows; the rows past them are garbage.
FILLS = {
    "balanced": ((2, 2, 2, 2), 8),
    "an empty group": ((3, 0, 4, 1), 8),
    "one group has all": ((0, 0, 8, 0), 8),
    "all empty": ((0, 0, 0, 0), 8),
    "partly filled": ((1, 0, 2, 1), 8),
    "the last ones empty": ((2, 1, 0, 0), 8),
}
# Largest error of an array over its own largest element, as in the tests of the layer. float32
# leaves 3e-7 here, bfloat16 rounds the result and, of a gradient, what it is made from.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclasses.dataclass
class Case:
    x: jax.Array
    w: jax.Array
    sizes: jax.Array
    dy: jax.Array

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        return self.x, self.w, self.sizes, self.dy


def case(
    sizes: tuple[int, ...],
    rows: int,
    *,
    dims: tuple[int, int] = (IN, OUT),
    dtype: str = "float32",
    fillers: int = 0,
    seed: int = 0,
) -> Case:
    """Make random arrays: a group's last `fillers` rows are zero, those past the groups garbage."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, dims[0]))
    dy = random.normal(size=(rows, dims[1]))
    ends = np.cumsum(sizes)
    for size, end in zip(sizes, ends, strict=True):
        x[end - min(size, fillers) : end] = 0
    x[ends[-1] :] = 1e3
    w = random.normal(size=(len(sizes), *dims))
    return Case(
        jnp.asarray(x, dtype),
        jnp.asarray(w, dtype),
        jnp.asarray(sizes, jnp.int32),
        jnp.asarray(dy, dtype),
    )


def multiply(x: jax.Array, w: jax.Array, sizes: jax.Array, using: GroupedProduct) -> jax.Array:
    if using is ON_TPU:
        return product(*vary_alike(x, w, sizes), OnTpu(interpret=True))
    return grouped_product(x, w, sizes, using=using, platform="cpu")


def outputs(using: GroupedProduct) -> Callable[..., tuple[jax.Array, ...]]:
    """Return a function of the product, and of x's and w's gradients for a given cotangent."""

    def run(x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
        y, gradients = jax.vjp(partial(multiply, sizes=sizes, using=using), x, w)
        return (y, *gradients(dy))

    return run


def compare(found: tuple[Any, ...], answer: Answer, tolerance: float = 1e-5) -> None:
    y, dx, dw = (np.asarray(each, np.float64) for each in found)
    close(y[: answer.rows], answer.y[: answer.rows], tolerance)
    close(dx[: answer.rows], answer.dx[: answer.rows], tolerance)
    close(dw, answer.dw, tolerance)
    empty = [group for group, each in enumerate(answer.dw) if not each.any()]
    assert not dw[empty].any()
    # What follows may multiply these by 0, so they must be numbers.
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert found.shape == expected.shape
    if expected.size:
        assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-30)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", ROUTINES)
def test_equals_the_loop_over_groups(name: str, fill: str) -> None:
    units, rows = FILLS[fill]
    given = case(tuple(16 * each for each in units), 16 * rows, fillers=5)
    found = jax.jit(outputs(ROUTINES[name]))(*given.arrays)
    compare(found, grouped(*given.arrays))


@pytest.mark.parametrize("filled", [0, 16, 64])
def test_one_group_is_a_plain_product(filled: int) -> None:
    using = choose("auto", platform="cpu", groups=1, rows=64, dtype="float32")
    assert (using.name, using.alignment) == ("single", 1)
    given = case((filled,), 64)
    compare(jax.jit(outputs(using))(*given.arrays), grouped(*given.arrays))


@pytest.mark.parametrize("name", ROUTINES)
def test_bfloat16(name: str) -> None:
    given = case((32, 0, 64, 16), 128, dtype="bfloat16")
    found = jax.jit(outputs(ROUTINES[name]))(*given.arrays)
    assert {each.dtype for each in found} == {jnp.dtype("bfloat16")}
    compare(found, grouped(*given.arrays), TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    "sizes", [(48, 0, 16, 36), (13, 0, 40, 47), (0, 0, 0, 0), (0, 3, 0, 0), (1, 1, 1, 93)]
)
@pytest.mark.parametrize("block", [16, 256])
def test_the_gradient_of_a_tpu_takes_groups_of_any_size(sizes: tuple[int, ...], block: int) -> None:
    """100 rows are not a multiple of a block, and up to four groups share a block."""
    given = case(sizes, 100)
    outer = partial(tpu_kernel.outer, block=block, interpret=True)
    dw = jax.jit(outer)(given.x, given.dy, given.sizes)
    expected = grouped(*given.arrays).dw
    close(np.asarray(dw, np.float64), expected, 1e-5)


@pytest.mark.parametrize("sizes", [(96, 0), (0, 96), (48, 48, 0), (17, 0, 79), (0, 0, 0)])
def test_a_tpu_visits_every_group_and_no_block_beyond_the_rows(sizes: tuple[int, ...]) -> None:
    """The interpreter clamps an index out of bounds; a TPU need not."""
    groups, blocks = len(sizes), 6
    visited, of_group, _ = tpu_kernel._visits(
        jnp.array(sizes, jnp.int32), visits=blocks + groups - 1, blocks=blocks, block=16
    )
    assert {*of_group.tolist()} == {*range(groups)}
    assert of_group.tolist() == sorted(of_group.tolist())
    assert 0 <= int(visited.min()) <= int(visited.max()) < blocks


@pytest.mark.parametrize(
    ("dim", "most", "part"),
    [
        (24, 2048, 24),
        (2048, 2048, 2048),
        (14336, 2048, 2048),
        (3584, 2048, 1792),
        (2048, 1365, 1024),
    ],
)
def test_tiles_of_a_tpu_divide_a_dim_evenly(dim: int, most: int, part: int) -> None:
    assert tpu_kernel._even_part(dim, most) == part


def test_the_gradient_of_a_tpu_in_tiles() -> None:
    given = case((30, 0, 40, 20), 100, dims=(600, 520))
    dw = jax.jit(partial(tpu_kernel.outer, block=32, interpret=True))(
        given.x, given.dy, given.sizes
    )
    close(np.asarray(dw, np.float64), grouped(*given.arrays).dw, 1e-5)


def test_ragged_dot_takes_groups_of_any_size() -> None:
    given = case((13, 0, 40, 7), 70)
    found = jax.jit(outputs(ROUTINES["ragged_dot"]))(*given.arrays)
    compare(found, grouped(*given.arrays))


@pytest.mark.parametrize("dims", [(96, 200), (16, 128), (130, 10)])
@pytest.mark.parametrize("block", [16, 32])
def test_the_kernel_where_tiles_reach_over_the_edges(dims: tuple[int, int], block: int) -> None:
    # 288 rows make more blocks than a band of the grid has, and not a multiple of that number.
    given = case((96, 0, 32, 128), 288, dims=dims)
    found = jax.jit(outputs(GroupedProduct("pallas", block, "a test")))(*given.arrays)
    compare(found, grouped(*given.arrays))


@pytest.mark.parametrize("name", ROUTINES)
def test_the_same_bits_every_run(name: str) -> None:
    given = case((32, 0, 64, 16), 128)
    run = jax.jit(outputs(ROUTINES[name]))
    first, second = run(*given.arrays), run(*given.arrays)
    for one, other in zip(first, second, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("name", ROUTINES)
def test_under_checkpoint_in_a_scan(name: str) -> None:
    """Stack three rematerialised layers of one shape, as a decoder does."""
    given = case((32, 0, 64, 16), 128, dims=(IN, IN))
    weights = jnp.stack([given.w * scale / 5 for scale in (1.0, 0.5, 2.0)])

    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return multiply(x, w, given.sizes, ROUTINES[name]), None

        y, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
        return jnp.sum(y * given.dy)

    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(given.x, weights)
    kept = [np.asarray(given.x, np.float64)]
    for w in weights:
        kept.append(grouped(kept[-1], w, given.sizes, given.dy).y)
    # Rows past the groups are zero after a layer, so their gradient goes no further.
    dy = np.asarray(given.dy, np.float64)
    for layer in (2, 1, 0):
        answer = grouped(kept[layer], weights[layer], given.sizes, dy)
        close(np.asarray(dw[layer], np.float64), answer.dw, 1e-5)
        dy = answer.dx
    close(np.asarray(dx, np.float64)[: answer.rows], dy[: answer.rows], 1e-5)


def shares(case: Case, groups: int, rows: int) -> Iterator[Any]:
    """Yield each device's part on a mesh of data 2 x expert 4, and its position in the whole."""
    x, w, sizes, dy = (np.asarray(each) for each in case.arrays)
    for data in range(2):
        for expert in range(4):
            at = data * 4 + expert
            ours = (
                slice(data * rows, (data + 1) * rows),
                slice(expert * groups, (expert + 1) * groups),
                slice(at * groups, (at + 1) * groups),
                slice(at * rows, (at + 1) * rows),
            )
            yield ours, (x[ours[0]], w[ours[1]], sizes[ours[2]], dy[ours[3]])


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", [*ROUTINES, "single"])
def test_inside_shard_map(name: str, check_vma: bool) -> None:
    """x varies over one axis, w over the other and sizes over both, so gradients must be summed."""
    rows = 64
    groups = 1 if name == "single" else 3
    using = ROUTINES.get(name, GroupedProduct("single", 1, "a test"))
    random = np.random.default_rng(7)
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    both = P(("data", "expert"))
    sizes = 16 * random.integers(0, 2, size=8 * groups)
    given = Case(
        jnp.asarray(random.normal(size=(2 * rows, IN)), jnp.float32),
        jnp.asarray(random.normal(size=(4 * groups, IN, OUT)), jnp.float32),
        jnp.asarray(sizes, jnp.int32),
        jnp.asarray(random.normal(size=(8 * rows, OUT)), jnp.float32),
    )

    def loss(x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array) -> Any:
        def on_device(x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array) -> Any:
            y = multiply(x, w, sizes, using)
            return jax.lax.psum(jnp.sum(y * dy), ("data", "expert")), y

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(P("data"), P("expert"), both, both),
            out_specs=(P(), both),
            check_vma=check_vma,
        )(x, w, sizes, dy)

    found = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*given.arrays)
    (_, y), (dx, dw) = found
    expected_dx, expected_dw = np.zeros(given.x.shape), np.zeros(given.w.shape)
    for (at_x, at_w, _, at_y), share in shares(given, groups, rows):
        answer = grouped(*share)
        expected_dx[at_x] += answer.dx
        expected_dw[at_w] += answer.dw
        close(np.asarray(y)[at_y][: answer.rows], answer.y[: answer.rows], 1e-5)
    # Every routine gives rows past the groups a zero gradient, so that sums are correct.
    close(np.asarray(dx, np.float64), expected_dx, 1e-5)
    close(np.asarray(dw, np.float64), expected_dw, 1e-5)


def compiled(using: GroupedProduct, rows: int, groups: int, dims: tuple[int, int]) -> Any:
    shapes = ((rows, dims[0]), (groups, *dims), (groups,), (rows, dims[1]))
    dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    arguments = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes, strict=True)]
    return jax.jit(outputs(using)).lower(*arguments).compile()


@pytest.mark.parametrize(("groups", "rows"), [(2, 1024), (16, 4096), (64, 4096)])
def test_blocked_multiplies_every_row_once(groups: int, rows: int) -> None:
    using = choose("auto", platform="cpu", groups=groups, rows=rows, dtype="float32")
    padded = rows + groups * (using.alignment - 1)
    padded -= padded % -using.alignment
    program = compiled(using, padded, groups, (64, 96))
    flops = sum(flops_by_scope(extract_collectives(program.as_text()).walk).values())
    exact = 3 * 2 * rows * 64 * 96
    assert exact < flops <= 1.15 * exact
    # One float32 copy of the weights' gradient, and the blocks.
    block = using.alignment * (64 + 96) * 4
    weights = 64 * 96 * 4
    scratch = program.memory_analysis().temp_size_in_bytes
    assert scratch <= groups * weights + 8 * block + 4 * weights + 20_000


def test_ragged_dot_on_a_cpu_is_what_blocked_avoids() -> None:
    program = compiled(ROUTINES["ragged_dot"], 1024, 16, (64, 96))
    flops = sum(flops_by_scope(extract_collectives(program.as_text()).walk).values())
    assert flops > 10 * 3 * 2 * 1024 * 64 * 96


def chosen(requested: Any, platform: str, groups: int = 8, rows: int = 16384) -> GroupedProduct:
    return choose(
        requested,
        platform=platform,
        groups=groups,
        rows=rows,
        dtype=jnp.bfloat16,
    )


@pytest.mark.parametrize(
    ("platform", "name", "alignment", "says"),
    [
        ("cpu", "blocked", 128, "CPU's ragged_dot multiplies every row"),
        ("tpu", "ragged_dot", 1, "TPU's own grouped kernel"),
        ("cuda", "pallas", 128, "a grouped kernel"),
        ("rocm", "pallas", 128, "a grouped kernel"),
    ],
)
def test_auto(platform: str, name: str, alignment: int, says: str) -> None:
    using = chosen("auto", platform)
    assert (using.name, using.alignment) == (name, alignment)
    assert says in using.reason
    assert "\n" not in using.reason
    assert chosen("auto", platform, groups=1).name == "single"


@pytest.mark.parametrize("rows", [1, 100, 5000, 10**6])
@pytest.mark.parametrize("groups", [2, 16, 256])
def test_blocks_on_a_cpu_are_as_large_as_padding_allows(rows: int, groups: int) -> None:
    block = chosen("blocked", "cpu", groups, rows).alignment
    assert 8 <= block <= 128
    assert block & (block - 1) == 0
    assert block == 8 or groups * block / 2 <= rows / 16
    assert block == 128 or groups * block * 2 / 2 > rows / 16


@pytest.mark.parametrize("platform", ["cuda", "rocm", "cpu"])
@pytest.mark.parametrize("rows", [1, 100, 5000, 32768, 10**6])
@pytest.mark.parametrize("groups", [2, 16, 128, 256])
def test_blocks_on_a_gpu_are_smaller_than_an_average_group(
    platform: str, rows: int, groups: int
) -> None:
    block = chosen("pallas", platform, groups, rows).alignment
    assert block in (16, 32, 64, 128)
    assert block == 16 or groups * block < rows
    assert block == 128 or groups * block * 2 >= rows


@pytest.mark.parametrize(
    ("requested", "platform", "says"),
    [
        ("tokamax", "rocm", "tokamax has no kernel for rocm"),
        ("tokamax", "cpu", "tokamax has no kernel for cpu"),
        ("tokamax", "tpu", "tokamax is not installed\nfix: pip install tokamax"),
        ("tokamax", "cuda", "tokamax is not installed\nfix: pip install tokamax"),
        ("pallas", "tpu", "fix: auto or ragged_dot"),
    ],
)
def test_what_cannot_run_there_is_said(
    requested: str, platform: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError) as raised:
        chosen(requested, platform)
    assert says in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3


@pytest.mark.parametrize("requested", [*get_args(GroupedProductName)])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda", "rocm"])
def test_every_choice_has_a_reason(
    requested: str, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    try:
        using = chosen(requested, platform)
    except UserError:
        return
    assert len(using.reason) > 10
    if requested != "auto":
        assert using.name == requested
        assert using.reason.startswith("by name") or using.name == chosen("auto", platform).name


def test_a_wide_dtype_is_refused_by_the_kernel() -> None:
    with pytest.raises(UserError, match="float32 and narrower"):
        choose("pallas", platform="cuda", groups=2, rows=9, dtype=np.float64)
