"""Cut arrays into blocks for the attention kernels on the Triton backend, load and store them.

A head size that is no power of two is cut into pieces that are: 192 into 128 and 64.

Blocks, warps and stages are estimates from the sizes of registers and shared memory: they compile
for Hopper and CDNA, and were never timed, as there was no GPU to time them on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import ManualAxisType
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_shard.layers.kernels.reach import Reach

SMALLEST = 16  # the least that a Triton product accepts, in every dim
LARGEST_HEAD = 256
LOG2_E = math.log2(math.e)
NOTHING = -1e30
"""Score of a key that is not seen, finite so that differences of two are numbers."""


class Tile(NamedTuple):
    """Hold how one kernel is cut: queries and keys of a block, warps, and stages of its loop."""

    rows: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Hold the tiles of the three kernels."""

    forward: Tile
    dkv: Tile
    dq: Tile


# By platform, for head sizes up to the number and elements of two bytes. On Hopper no registers
# spill, as ptxas 12.9 counts them, but 33 of dkv at 128, where fewer rows would make its products
# 32 wide, half of what the matrix unit takes at once. AMD's compute units have 64 KB of shared
# memory, a third of Hopper's, and gain nothing from a deeper pipeline.
_TILES = {
    "cuda": {
        64: Tiles(Tile(128, 128, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
        128: Tiles(Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
        256: Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)),
    },
    "rocm": {
        64: Tiles(Tile(128, 64, 4, 1), Tile(32, 64, 4, 1), Tile(64, 32, 4, 1)),
        128: Tiles(Tile(128, 32, 4, 1), Tile(32, 64, 4, 1), Tile(64, 32, 4, 1)),
        256: Tiles(Tile(64, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)),
    },
}


@dataclass(frozen=True)
class Plan:
    """Hold what is known when a program is traced.

    Attributes:
        scale: factor of the products.
        soft_cap: 0 for none.
        has_sink: whether the sinks count.
        platform: "cuda", "rocm", or "cpu" for the interpreter.
    """

    scale: float
    soft_cap: float
    has_sink: bool
    platform: str

    def tiles(self, query: Float[Array, "B S N D"], value: Float[Array, "B T J Dv"]) -> Tiles:
        """Return the tiles for these sizes; no tile is larger than what it cuts."""
        table = _TILES["cuda" if self.platform == "cpu" else self.platform]
        dim = max(query.shape[3], value.shape[3])
        # Elements of four bytes fill twice the space.
        tiles = table[min(size for size in table if size >= min(dim, LARGEST_HEAD))]
        halves = 2 if query.dtype.itemsize == 4 else 1

        def fit(tile: Tile) -> Tile:
            rows, columns = (
                max(SMALLEST, min(size // halves, pl.next_power_of_2(there)))
                for size, there in ((tile.rows, query.shape[1]), (tile.columns, value.shape[1]))
            )
            return tile._replace(rows=rows, columns=columns)

        return Tiles(*map(fit, tiles))

    def raw(
        self, scores: Float[Array, "R C"]
    ) -> tuple[Float[Array, "R C"], Float[Array, "R C"] | None]:
        """Return scores in units of log 2, from products, and the tanh of the soft cap."""
        if not self.soft_cap:
            return scores * (self.scale * LOG2_E), None
        bent = jnp.tanh(scores * (self.scale / self.soft_cap))
        return bent * (self.soft_cap * LOG2_E), bent

    def call(
        self,
        body: Callable[..., None],
        *,
        name: str,
        grid: tuple[int, ...],
        tile: Tile,
        out: tuple[tuple[tuple[int, ...], DTypeLike], ...],
        like: Float[Array, "..."],
    ) -> Callable[..., Any]:
        """Return a kernel as a function; its results vary over `like`'s mesh axes."""
        cpu = self.platform == "cpu"
        varies = ManualAxisType() if cpu else jax.typeof(like).manual_axis_type
        return pl.pallas_call(
            body,
            name=name,
            grid=grid,
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varies) for shape, dtype in out
            ],
            compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=cpu,
        )


def blocks_met(
    reach: Reach, tile: Tile, places: int, *, by_keys: bool = False
) -> Int[Array, "B blocks 4"]:
    """Return, for each block of queries or of keys, which of the others it meets.

    They are a range, as what queries see starts and ends later from each to the next. Its two ends
    are the first and the last of four numbers; between the other two are those that need no mask.
    """
    short = -reach.first.shape[1] % tile.rows

    def by_block(of: Int[Array, "B S"]) -> Int[Array, "B I R"]:
        return jnp.pad(of, ((0, 0), (0, short)), mode="edge").reshape(of.shape[0], -1, tile.rows)

    firsts, lasts = by_block(reach.first), by_block(reach.last)
    earliest, latest = firsts.min(axis=2)[:, :, None], firsts.max(axis=2)[:, :, None]
    least, most = lasts.min(axis=2)[:, :, None], lasts.max(axis=2)[:, :, None]
    start = jnp.arange(0, places, tile.columns, dtype=jnp.int32)[None, None]
    end = start + tile.columns - 1

    def count(each: Bool[Array, "B I U"]) -> Int[Array, "B blocks"]:
        return jnp.sum(each, axis=1 if by_keys else 2, dtype=jnp.int32)

    if by_keys:
        ends = (most < start), (least < end), (latest <= start), (earliest <= end)
    else:
        ends = (end < earliest), (start < latest), (end <= least), (start <= most)
    first, whole, partly, last = map(count, ends)
    whole = jnp.minimum(whole, last)
    return jnp.stack([first, whole, jnp.clip(partly, whole, last), last], axis=-1)


def over_blocks(
    met_ref: Any,
    index: tuple[Any, ...],
    step: Callable[[bool, Int[Array, ""], Any], Any],
    carry: Any,
) -> Any:
    """Make a step for each block that is met, with a mask where one is needed."""
    ends = [met_ref[(*index, at)] for at in range(4)]
    for masked, start, end in zip((True, False, True), ends, ends[1:], strict=False):
        carry = lax.fori_loop(start, end, partial(step, masked), carry)
    return carry


class Range(NamedTuple):
    """Hold a range of one dim: its start, its size, and the size of the dim."""

    start: Any
    size: int
    dim: int


def head_pieces(dim: int) -> list[Range]:
    """Cut a head, of a multiple of 16 elements, into ranges whose sizes are powers of two."""
    found, start = [], 0
    while start < dim:
        size = 1 << ((dim - start).bit_length() - 1)
        found.append(Range(start, size, dim))
        start += size
    return found


def zero_pieces(rows: int, dim: int) -> tuple[Float[Array, "R _"], ...]:
    """Return sums of rows, a tile for each piece of a head."""
    return tuple(jnp.zeros((rows, each.size), jnp.float32) for each in head_pieces(dim))


def load_head(ref: Any, row: Any, tokens: Range, head: Any, dim: int) -> list[Float[Array, "R _"]]:
    """Load a block of tokens of one head, in pieces."""
    return [load_tile(ref, (row, tokens, head, piece)) for piece in head_pieces(dim)]


def scores_of(a: list[Float[Array, "R _"]], b: list[Float[Array, "C _"]]) -> Float[Array, "R C"]:
    """Multiply rows of `a` by rows of `b`, heads in pieces."""
    first, *others = (dot_tiles(x, y, (1, 1)) for x, y in zip(a, b, strict=True))
    return sum(others, start=first)


def dot_tiles(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], contracted: tuple[int, int]
) -> Float[Array, "_ _"]:
    """Multiply two tiles, summed in float32."""
    (of_a, of_b), none = contracted, ((), ())
    return lax.dot_general(a, b, (((of_a,), (of_b,)), none), preferred_element_type=jnp.float32)


def in_reach(
    first: Int[Array, "R"], last: Int[Array, "R"], keys: Range, *, transposed: bool = False
) -> Bool[Array, "_ _"]:
    """Return which keys of a block are in the ranges that queries see, queries by keys."""
    place = keys.start + lax.iota(jnp.int32, keys.size)
    if transposed:
        return (place[:, None] >= first[None, :]) & (place[:, None] <= last[None, :])
    return (place[None, :] >= first[:, None]) & (place[None, :] <= last[:, None])


def _there(index: tuple[Any, ...]) -> Bool[Array, "..."] | None:
    """Return which elements of a tile are inside the array; None where none can be outside."""
    ranges = [each for each in index if isinstance(each, Range)]
    shape = tuple(each.size for each in ranges)
    there: Bool[Array, "..."] | None = None
    for axis, each in enumerate(ranges):
        if each.dim % each.size:
            inside = each.start + lax.broadcasted_iota(jnp.int32, shape, axis) < each.dim
            there = inside if there is None else there & inside
    return there


def _at(ref: Any, index: tuple[Any, ...]) -> Any:
    return ref.at[
        tuple(pl.ds(each.start, each.size) if isinstance(each, Range) else each for each in index)
    ]


def load_tile(ref: Any, index: tuple[Any, ...]) -> Shaped[Array, "..."]:
    """Load a tile, 0 beyond the edges of the array."""
    there = _there(index)
    tile = _at(ref, index)
    return triton.load(tile) if there is None else triton.load(tile, mask=there, other=0)


def store_tile(ref: Any, index: tuple[Any, ...], tile: Float[Array, "..."]) -> None:
    """Store a tile, without what is beyond the edges of the array."""
    triton.store(_at(ref, index), tile.astype(ref.dtype), mask=_there(index))
