"""Compute grouped products by Pallas kernels on the Triton backend, for NVIDIA and AMD.

There are five kernels, under these names in HLO: `grouped_forward`, `grouped_dx` (the same with the
weights read transposed) and `grouped_dw`; and for an MLP's gate and up together `grouped_gated`,
which reads the rows once and writes the activation of the two, and `grouped_gated_dx`, the gradient
of its rows. A program of `grouped_dw` computes a tile of one group's gradient, for which it loops
over that group's rows; a program of the others a tile of one block of rows, whose group is read
from a table. Every sum has a fixed order: same bits every run.

Tiles, warps and stages are chosen from a table (`moe.grouped.tiles`), by the shape of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import ManualAxisType
from jaxtyping import Array, Float, Int

from moe_shard.config.model_config import GatingConfig
from moe_shard.layers.activation import gated
from moe_shard.moe.grouped.blocks import owners
from moe_shard.moe.grouped.interpreted import interpreted
from moe_shard.moe.grouped.tiles import ESTIMATED, ProductName, ProductTile, Tiling

# Blocks of rows whose tiles run next to each other, so that they share weights in the cache.
_BAND = 8


@dataclass(frozen=True)
class Triton:
    """Multiply by the kernels of this file.

    Attributes:
        block: rows of a block, a power of two from 16 on; a divisor of the rows and of every
            group's size.
        platform: "cuda" or "rocm"; on "cpu" the kernels run in Pallas's interpreter.
        tiling: the tiles.
    """

    block: int
    platform: str
    tiling: Tiling = ESTIMATED

    def multiply(
        self,
        x: Float[Array, "N A"],
        w: Float[Array, "G A P"] | Float[Array, "G P A"],
        group_sizes: Int[Array, "G"],
        *,
        transposed: bool,
    ) -> Float[Array, "N P"]:
        """Multiply rows by their group's weights or the transpose; rows past the groups give 0."""
        name: ProductName = "dx" if transposed else "forward"

        def body(part: _Part, x_ref: Any, w_ref: Any, y_ref: Any) -> None:
            (y,) = part.sums(x_ref, [w_ref])
            part.store(y_ref, y)

        of_rows = self._by_rows(body, w, group_sizes, product=name, transposed=transposed)
        (y,) = of_rows(x, w)
        return y

    def gated(
        self,
        x: Float[Array, "N A"],
        gate: Float[Array, "G A P"],
        up: Float[Array, "G A P"],
        biases: Sequence[Float[Array, "G P"]],
        group_sizes: Int[Array, "G"],
        *,
        gating: GatingConfig,
        keep: bool,
    ) -> tuple[Float[Array, "N P"], ...]:
        """Compute the activation of gate and up in one kernel, see `gated.GatedRoutine`."""

        def body(part: _Part, x_ref: Any, gate_ref: Any, up_ref: Any, *refs: Any) -> None:
            of_gate, of_up = part.sums(x_ref, [gate_ref, up_ref])
            if biases:
                of_gate += part.load_bias(refs[0])
                of_up += part.load_bias(refs[1])
            tiles = (gated(of_gate, of_up, gating), of_gate, of_up)
            for ref, tile in zip(refs[len(biases) :], tiles, strict=False):
                part.store(ref, tile)

        results = 3 if keep else 1
        return self._by_rows(body, gate, group_sizes, product="gated", results=results)(
            x, gate, up, *biases
        )

    def gated_dx(
        self,
        by_gate: Float[Array, "N P"],
        by_up: Float[Array, "N P"],
        gate: Float[Array, "G A P"],
        up: Float[Array, "G A P"],
        group_sizes: Int[Array, "G"],
    ) -> Float[Array, "N A"]:
        """Add up the gradients of the rows by gate and by up, see `gated.GatedRoutine`."""

        def body(
            part: _Part, by_gate_ref: Any, gate_ref: Any, by_up_ref: Any, up_ref: Any, dx_ref: Any
        ) -> None:
            of_gate = part.sums(by_gate_ref, [gate_ref])
            (dx,) = part.sums(by_up_ref, [up_ref], of_gate)
            part.store(dx_ref, dx)

        of_rows = self._by_rows(
            body, gate, group_sizes, product="dx", transposed=True, name="grouped_gated_dx"
        )
        (dx,) = of_rows(by_gate, gate, by_up, up)
        return dx

    def outer(
        self, x: Float[Array, "N A"], dy: Float[Array, "N P"], group_sizes: Int[Array, "G"]
    ) -> Float[Array, "G A P"]:
        """Sum the outer products of x's and dy's rows over each group; 0 for an empty group."""
        groups, height, width = group_sizes.shape[0], x.shape[1], dy.shape[1]
        cut = self.tiling.tile("dw", (groups, len(x), height, width), self.block)
        tall, wide, step = cut.rows, cut.columns, cut.depth

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
        (dw,) = self._call(
            body,
            name="grouped_dw",
            tile=cut,
            grid=(pl.cdiv(height, tall), pl.cdiv(width, wide), groups),
            shapes=[(groups, height, width)],
            like=x,
        )(x, dy, jnp.pad(ends, (1, 0)))
        return dw

    def _by_rows(
        self,
        body: Callable[..., None],
        w: Float[Array, "G A P"],
        group_sizes: Int[Array, "G"],
        *,
        product: ProductName,
        transposed: bool = False,
        results: int = 1,
        name: str = "",
    ) -> Callable[..., tuple[Float[Array, "N _"], ...]]:
        """Return a kernel of rows by their group's weights, as a function of its operands.

        Args:
            body: computes the part of a program, from it and the references.
            w: the weights, or the first of several of one shape.
            group_sizes: rows of each group.
            product: whose tiles it takes.
            transposed: whether the weights are read transposed.
            results: how many arrays of one shape it writes.
            name: its name in HLO; empty: that of the product.
        """
        groups, into, outward = w.shape
        depth, out = (outward, into) if transposed else (into, outward)

        def call(x: Float[Array, "N _"], *others: Array) -> tuple[Float[Array, "N _"], ...]:
            cut = self.tiling.tile(product, (groups, len(x), into, outward), self.block)
            blocks = len(x) // cut.rows
            operands = (x, *others)

            def of_program(*refs: Any) -> None:
                at = pl.program_id(2) * _BAND + pl.program_id(0)
                column = pl.program_id(1) * cut.columns

                @pl.when(at < blocks)
                def _() -> None:
                    owner = refs[len(operands)][at]
                    part = _Part(cut, at * cut.rows, column, owner, depth, out, transposed)
                    body(part, *refs[: len(operands)], *refs[len(operands) + 1 :])

            return self._call(
                of_program,
                name=name or f"grouped_{product}",
                tile=cut,
                grid=(min(_BAND, blocks), pl.cdiv(out, cut.columns), pl.cdiv(blocks, _BAND)),
                shapes=[(len(x), out)] * results,
                like=x,
            )(*operands, owners(group_sizes, blocks=blocks, block=cut.rows))

        return call

    def _call(
        self,
        body: Callable[..., None],
        *,
        name: str,
        tile: ProductTile,
        grid: tuple[int, ...],
        shapes: Sequence[tuple[int, ...]],
        like: Float[Array, "N _"],
    ) -> Callable[..., tuple[Array, ...]]:
        """Return the kernel as a function; its results have `like`'s dtype and mesh axes."""
        cpu = self.platform == "cpu"
        varies = ManualAxisType() if cpu else jax.typeof(like).manual_axis_type
        kernel: Callable[..., tuple[Array, ...]] = pl.pallas_call(
            body,
            name=name,
            grid=grid,
            out_shape=tuple(
                jax.ShapeDtypeStruct(shape, like.dtype, manual_axis_type=varies) for shape in shapes
            ),
            compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=cpu,
        )
        return interpreted(kernel) if cpu else kernel


@dataclass(frozen=True)
class _Part:
    """Describe the part of a result that one program computes: a tile of a block of rows.

    Attributes:
        tile: its sizes.
        row: its first row.
        column: its first column.
        owner: group of the block; -1 past the last group.
        depth: size of the contracted dim.
        out: columns of the result.
        transposed: whether the weights are read transposed.
    """

    tile: ProductTile
    row: Array
    column: Array
    owner: Array
    depth: int
    out: int
    transposed: bool

    def sums(
        self, x_ref: Any, w_refs: Sequence[Any], totals: Sequence[Array] | None = None
    ) -> list[Array]:
        """Multiply the rows by each of the weights, in float32; they are read once for all.

        Args:
            x_ref: the rows.
            w_refs: the weights, all of one shape.
            totals: what to add to; None: zeros.
        """
        step, columns = self.tile.depth, self.tile.columns

        def add(index: Array, totals: list[Array]) -> list[Array]:
            k = index * step
            dims = ((k, step, self.depth), (self.column, columns, self.out))
            a = _load(x_ref, (self._rows, pl.ds(k, step)), (None, dims[0]))
            dims = dims[::-1] if self.transposed else dims
            at = (self.owner, *(pl.ds(start, size) for start, size, _ in dims))
            by = (1, 1 if self.transposed else 0)
            pairs = zip(totals, w_refs, strict=True)
            return [total + _dot(a, _load(ref, at, dims), by) for total, ref in pairs]

        if totals is None:
            totals = [jnp.zeros((self.tile.rows, columns), jnp.float32) for _ in w_refs]
        # A block past the groups makes no step, and stores zeros.
        steps = lax.select(self.owner >= 0, jnp.int32(pl.cdiv(self.depth, step)), jnp.int32(0))
        done: list[Array] = lax.fori_loop(0, steps, add, list(totals))
        return done

    def load_bias(self, ref: Any) -> Array:
        """Load the group's bias for the columns, [1 columns] in float32; 0 past the groups."""
        columns = pl.ds(self.column, self.tile.columns)
        there = jnp.broadcast_to(self.owner >= 0, (1, self.tile.columns))
        inside = _there(there.shape, (None, self._columns))
        there = there if inside is None else there & inside
        group = jnp.maximum(self.owner, 0)
        bias = triton.load(ref.at[pl.ds(group, 1), columns], mask=there, other=0)
        return bias.astype(jnp.float32)

    def store(self, ref: Any, tile: Array) -> None:
        """Store the part of a result."""
        there = _there(tile.shape, (None, self._columns))
        _store(ref, (self._rows, pl.ds(self.column, self.tile.columns)), tile, there)

    @property
    def _rows(self) -> Any:
        return pl.ds(self.row, self.tile.rows)

    @property
    def _columns(self) -> _Range:
        return (self.column, self.tile.columns, self.out)


# For one dim of an array: start and size of a tile, and size of the dim; None where tiles fit.
_Range = tuple[Any, int, int] | None


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
