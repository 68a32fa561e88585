"""Compute grouped products by Pallas kernels on the Triton backend, for NVIDIA and AMD.

There are three kernels, under these names in HLO: `grouped_forward`, `grouped_dx` (the same with
the weights read transposed) and `grouped_dw`. One program of the first two computes a tile of one
block of rows, whose group is read from a table; one program of the third a tile of one group's
gradient, for which it loops over that group's rows. Every sum has a fixed order: same bits every
run.

Tiles, warps and stages are estimates from the sizes of shared memory and of the matrix units: they
compile for Hopper and CDNA, and were never timed, as there was no GPU to time them on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import ManualAxisType
from jaxtyping import Array, Float, Int

from moe_shard.moe.grouped.blocks import owners
from moe_shard.moe.grouped.interpreted import interpreted

# Blocks of rows whose tiles run next to each other, so that they share weights in the cache.
_BAND = 8
_TILE = 128
_SMALLEST = 16  # the least that a Triton product accepts, in every dim
_DEPTH_BYTES = 128  # of one row of a tile that is being contracted: a cache line
_STAGES = {"cuda": 4, "rocm": 2, "cpu": 1}


@dataclass(frozen=True)
class Triton:
    """Multiply by the kernels of this file.

    Attributes:
        block: rows of a block, a power of two from 16 on; a divisor of the rows and of every
            group's size.
        platform: "cuda" or "rocm"; on "cpu" the kernels run in Pallas's interpreter.
    """

    block: int
    platform: str

    def multiply(
        self,
        x: Float[Array, "N A"],
        w: Float[Array, "G A P"] | Float[Array, "G P A"],
        group_sizes: Int[Array, "G"],
        *,
        transposed: bool,
    ) -> Float[Array, "N P"]:
        """Multiply rows by their group's weights or the transpose; rows past the groups give 0."""
        blocks, depth, out = x.shape[0] // self.block, x.shape[1], w.shape[1 if transposed else 2]
        tile, step = _tile(out), _depth(x)

        def body(x_ref: Any, w_ref: Any, owner_ref: Any, y_ref: Any) -> None:
            at = pl.program_id(2) * _BAND + pl.program_id(0)
            column = pl.program_id(1) * tile

            @pl.when(at < blocks)
            def _() -> None:
                rows, owner = pl.ds(at * self.block, self.block), owner_ref[at]

                def add(index: Array, total: Array) -> Array:
                    k = index * step
                    a = _load(x_ref, (rows, pl.ds(k, step)), (None, (k, step, depth)))
                    dims = ((k, step, depth), (column, tile, out))
                    dims = dims[::-1] if transposed else dims
                    slices = tuple(pl.ds(start, size) for start, size, _ in dims)
                    b = _load(w_ref, (owner, *slices), dims)
                    return total + _dot(a, b, (1, 1 if transposed else 0))

                # A block past the groups makes no step, and stores zeros.
                steps = lax.select(owner >= 0, jnp.int32(pl.cdiv(depth, step)), jnp.int32(0))
                y = lax.fori_loop(0, steps, add, jnp.zeros((self.block, tile), jnp.float32))
                there = _there(y.shape, (None, (column, tile, out)))
                _store(y_ref, (rows, pl.ds(column, tile)), y, there)

        return self._call(
            body,
            name="grouped_dx" if transposed else "grouped_forward",
            grid=(min(_BAND, blocks), pl.cdiv(out, tile), pl.cdiv(blocks, _BAND)),
            shape=(x.shape[0], out),
            like=x,
        )(x, w, owners(group_sizes, blocks=blocks, block=self.block))

    def outer(
        self, x: Float[Array, "N A"], dy: Float[Array, "N P"], group_sizes: Int[Array, "G"]
    ) -> Float[Array, "G A P"]:
        """Sum the outer products of x's and dy's rows over each group; 0 for an empty group."""
        groups, height, width = group_sizes.shape[0], x.shape[1], dy.shape[1]
        tall, wide, step = _tile(height), _tile(width), min(self.block, _depth(x))

        def body(x_ref: Any, dy_ref: Any, ends_ref: Any, dw_ref: Any) -> None:
            row, column, group = pl.program_id(0) * tall, pl.program_id(1) * wide, pl.program_id(2)
            start, end = ends_ref[group], ends_ref[group + 1]

            def add(index: Array, total: Array) -> Array:
                rows = pl.ds(start + index * step, step)
                a = _load(x_ref, (rows, pl.ds(row, tall)), (None, (row, tall, height)))
                b = _load(dy_ref, (rows, pl.ds(column, wide)), (None, (column, wide, width)))
                return total + _dot(a, b, (0, 0))

            dw = lax.fori_loop(
                0, lax.div(end - start, jnp.int32(step)), add, jnp.zeros((tall, wide), jnp.float32)
            )
            there = _there(dw.shape, ((row, tall, height), (column, wide, width)))
            _store(dw_ref, (group, pl.ds(row, tall), pl.ds(column, wide)), dw, there)

        ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
        return self._call(
            body,
            name="grouped_dw",
            grid=(pl.cdiv(height, tall), pl.cdiv(width, wide), groups),
            shape=(groups, height, width),
            like=x,
        )(x, dy, jnp.pad(ends, (1, 0)))

    def _call(
        self,
        body: Callable[..., None],
        *,
        name: str,
        grid: tuple[int, ...],
        shape: tuple[int, ...],
        like: Float[Array, "N _"],
    ) -> Callable[..., Array]:
        """Return the kernel as a function; its result has `like`'s dtype and mesh axes."""
        cpu = self.platform == "cpu"
        varies = ManualAxisType() if cpu else jax.typeof(like).manual_axis_type
        kernel: Callable[..., Array] = pl.pallas_call(
            body,
            name=name,
            grid=grid,
            out_shape=jax.ShapeDtypeStruct(shape, like.dtype, manual_axis_type=varies),
            compiler_params=triton.CompilerParams(
                num_warps=8 if self.block == _TILE and self.platform == "cuda" else 4,
                num_stages=_STAGES[self.platform],
            ),
            interpret=cpu,
        )
        return interpreted(kernel) if cpu else kernel


# For one dim of an array: start and size of a tile, and size of the dim; None where tiles fit.
_Range = tuple[Any, int, int] | None


def _tile(dim: int) -> int:
    return max(_SMALLEST, min(_TILE, pl.next_power_of_2(dim)))


def _depth(x: Float[Array, "N A"]) -> int:
    """Return how much of the contracted dim one step of the loop multiplies."""
    return max(_SMALLEST, _DEPTH_BYTES // x.dtype.itemsize)


def _dot(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    (of_a, of_b), none = contracted, ((), ())
    dims = (((of_a,), (of_b,)), none)
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _there(shape: tuple[int, ...], ranges: tuple[_Range, ...]) -> Array | None:
    """Return which elements of a tile are inside the array; None where no tile crosses an edge."""
    there: Array | None = None
    for axis, each in enumerate(ranges):
        if each is not None and each[2] % each[1]:
            start, _, dim = each
            inside = start + lax.broadcasted_iota(jnp.int32, shape, axis) < dim
            there = inside if there is None else there & inside
    return there


def _load(ref: Any, index: tuple[Any, ...], ranges: tuple[_Range, ...]) -> Array:
    """Load a tile of two dims, 0 beyond the edges of the array."""
    tile = ref.at[index]
    there = _there(tile.shape, ranges)
    return triton.load(tile) if there is None else triton.load(tile, mask=there, other=0)


def _store(ref: Any, index: tuple[Any, ...], tile: Array, there: Array | None) -> None:
    triton.store(ref.at[index], tile.astype(ref.dtype), mask=there)
