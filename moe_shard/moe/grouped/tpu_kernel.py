"""Compute the gradient of the weights by a Pallas kernel for TPU.

`lax.ragged_dot` is a grouped kernel on TPU, and so is its gradient of the rows. Its gradient of the
weights is not: it multiplies every row for every group, masked, as a convolution (read in the
compiled program of v5e and v6e, libtpu 0.0.42). Here a program visits the blocks of rows of one
group after the other, adds up one tile of that group's gradient, and goes on to the next group.

Tiles and blocks are from the compiler's own schedule of this kernel (the bundles of one visit,
libtpu 0.0.42; nothing was timed, as there was no TPU). Products a bundle, of 65,536 on v5e and
262,144 on v6e: with a tile of 1024 x 1024 and blocks of 128, 256 and 512 rows 37, 48 and 57
thousand on v5e and 58, 110 and 145 on v6e; with 512 x 2048 and 512 rows 62 and 148. A block that
two groups share is multiplied for both, so that blocks of 512 rows pay where groups have about
1,024 rows or more, on both; larger ones exceed the on-chip memory of v5e.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jax.sharding import ManualAxisType
from jaxtyping import Array, Float, Int

from moe_shard.moe.grouped.interpreted import interpreted

_BLOCK, _TALL_BLOCK = 256, 512
_ROWS_FOR_TALL = 1024  # of a group, on average
# Bytes of an element -> columns of a tile, and its elements: sums in float32 take 4 MB at most.
_TILES = {2: (2048, 2**20), 4: (512, 2**18)}
_LANES = 128


def outer(
    x: Float[Array, "N A"],
    dy: Float[Array, "N P"],
    group_sizes: Int[Array, "G"],
    *,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "G A P"]:
    """Sum the outer products of x's and dy's rows over each group; 0 for an empty group.

    Args:
        x: rows, those of a group one after another; those past the groups are not read.
        dy: the gradients of their products.
        group_sizes: rows of each group, any numbers.
        block: rows of one step; None: as many as pay for the groups' average size.
        interpret: whether to run in Pallas's interpreter, on a CPU.
    """
    rows, groups = x.shape[0], group_sizes.shape[0]
    height, width = x.shape[1], dy.shape[1]
    columns, elements = _TILES[max(x.dtype.itemsize, 2)]
    wide = _even_part(width, columns)
    tall = _even_part(height, elements // wide)
    if block is None:
        many = rows >= _ROWS_FOR_TALL * groups and x.dtype.itemsize < 4
        block = _TALL_BLOCK if many else _BLOCK
    block = min(block, rows)
    # A block that two groups share is visited for both; for an empty group one is visited to write
    # its zeros. What is not visited is not written, and clearing it afterwards would take a copy.
    blocks = pl.cdiv(rows, block)
    visits = blocks + groups - 1
    visited, of_group, bounds = _visits(group_sizes, visits=visits, blocks=blocks, block=block)

    def grouped_dw(
        visited: Any, of_group: Any, bounds: Any, x_ref: Any, dy_ref: Any, dw_ref: Any, sums: Any
    ) -> None:
        at, group = pl.program_id(2), of_group[pl.program_id(2)]
        before, after = of_group[jnp.maximum(at - 1, 0)], of_group[jnp.minimum(at + 1, visits - 1)]

        @pl.when((at == 0) | (before != group))
        def _() -> None:
            sums[...] = jnp.zeros_like(sums)

        @pl.when((at < bounds[groups + 1]) & (bounds[group] < bounds[group + 1]))
        def _() -> None:
            row = visited[at] * block + lax.broadcasted_iota(jnp.int32, (block, 1), 0)
            ours = (row >= bounds[group]) & (row < bounds[group + 1])
            a = _only(x_ref[...], ours)
            # Past the end of the arrays there may be any value, and any value times 0 may be NaN.
            b = _only(dy_ref[...], ours) if rows % block else dy_ref[...]
            dims = (((0,), (0,)), ((), ()))
            sums[...] += lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

        @pl.when((at == visits - 1) | (after != group))
        def _() -> None:
            dw_ref[...] = sums[...].astype(dw_ref.dtype)

    kernel = pl.pallas_call(
        grouped_dw,
        name="grouped_dw",
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(height, tall), pl.cdiv(width, wide), visits),
            in_specs=[
                pl.BlockSpec((block, tall), lambda i, _, at, visited, *__: (visited[at], i)),
                pl.BlockSpec((block, wide), lambda _, j, at, visited, *__: (visited[at], j)),
            ],
            out_specs=pl.BlockSpec(
                (None, tall, wide), lambda i, j, at, _, of_group, __: (of_group[at], i, j)
            ),
            scratch_shapes=[tpu.VMEM((tall, wide), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (groups, height, width),
            x.dtype,
            manual_axis_type=ManualAxisType() if interpret else jax.typeof(x).manual_axis_type,
        ),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * height * width,
            transcendentals=0,
            bytes_accessed=(x.size + dy.size + groups * height * width) * x.dtype.itemsize,
        ),
        interpret=interpret,
    )
    call = interpreted(kernel) if interpret else kernel
    dw: Float[Array, "G A P"] = call(visited, of_group, bounds, x, dy)
    return dw


def _even_part(dim: int, most: int) -> int:
    """Return the size of the equal parts of a dim, of at most about `most` elements each."""
    parts = pl.cdiv(dim, max(most // _LANES * _LANES, _LANES))
    return dim if parts == 1 else pl.cdiv(pl.cdiv(dim, parts), _LANES) * _LANES


def _visits(
    group_sizes: Int[Array, "G"], *, visits: int, blocks: int, block: int
) -> tuple[Int[Array, "visits"], Int[Array, "visits"], Int[Array, "G+2"]]:
    """List the block and group of each visit, the bounds of groups, and how many visits count.

    Visits that do not count repeat the last one, so that nothing is fetched or written for them.
    """
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = ends - group_sizes
    first = starts // block
    each = jnp.where(group_sizes > 0, (ends - 1) // block - first + 1, 1)
    done = jnp.cumsum(each, dtype=jnp.int32)
    at = jnp.minimum(jnp.arange(visits, dtype=jnp.int32), done[-1] - 1)
    group = jnp.sum(done[None, :] <= at[:, None], axis=1, dtype=jnp.int32)
    # An empty group may begin where the last block ends.
    visited = jnp.minimum(first[group] + at - (done - each)[group], blocks - 1)
    bounds = jnp.concatenate([jnp.zeros_like(ends[:1]), ends, done[-1:]])
    return visited.astype(jnp.int32), group, bounds


def _only(tile: Float[Array, "R D"], rows: Array) -> Float[Array, "R D"]:
    """Set all other rows of the tile to zero."""
    # In float32: a mask of rows does not fit the packing of narrower elements.
    return jnp.where(rows, tile.astype(jnp.float32), 0).astype(tile.dtype)
