"""Measure which tiles of the grouped products' kernels are fastest on the device that is there.

For each shape the forward product comes first; its best tile decides how many rows a block has, by
which groups are aligned, and the other products are measured with that. Candidates are timed
round-robin (A B C, A B C, ...), so that a device that slows down slows all of them, and their
results are compared with those of the tile that is used without a measurement.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from moe_shard.config.model_config import GatingConfig
from moe_shard.errors import UserError
from moe_shard.layers.activation import gated
from moe_shard.moe.grouped.tiles import (
    TILED_PRODUCTS,
    ProductName,
    ProductShape,
    ProductTile,
    TileEntry,
    Tiling,
    tiling,
)
from moe_shard.moe.grouped.triton_kernel import Triton

SHAPES: dict[str, ProductShape] = {
    "Mixtral-8x7B": (8, 16384, 4096, 14336),
    "OLMoE-1B-7B": (64, 65536, 2048, 1024),
    "Qwen3-30B-A3B": (128, 32768, 2048, 768),
}
"""Name -> groups, their rows together, elements of an input row, of an output row."""
_THREADS = {"cuda": 32, "rocm": 64, "cpu": 32}
_STAGES = {"cuda": (3, 4), "rocm": (2,), "cpu": (1,)}
_DEPTH_BYTES = {"cuda": (128,), "rocm": (128, 64), "cpu": (128,)}
_OF_ONE_THREAD = (64, 128)  # elements of the result, in its registers
_MOST_DIFFERENT = 2e-2  # of the largest element; bfloat16 rounds to 4e-3
_FEW_PERCENT = 1.02
_LARGE_PRODUCT = 8192
_SMALL_PRODUCT = 256


@dataclass(frozen=True)
class Tuned:
    """Hold the best tile of one product and shape, as measured.

    Attributes:
        entry: the line for the table.
        seconds: median time of a call.
        before: that of the tile that was used so far.
        candidates: how many were measured.
        failed: how many did not compile or gave other results.
    """

    entry: TileEntry
    seconds: float
    before: float
    candidates: int
    failed: int

    def to_json(self) -> dict[str, Any]:
        """Return an object of `moe-shard bench --tune --json`."""
        return {
            **self.entry.line(),
            "seconds": self.seconds,
            "seconds_before": self.before,
            "candidates": self.candidates,
            "failed": self.failed,
        }


def tune(
    device: jax.Device,
    platform: str,
    shapes: Sequence[ProductShape],
    *,
    dtype: DTypeLike = jnp.bfloat16,
    seconds: float,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Tuned]:
    """Measure the candidates at some shapes and return the best ones.

    Args:
        device: the device; groups of random sizes are drawn for it.
        platform: "cuda" or "rocm"; on "cpu" the kernels run in an interpreter, to try this.
        shapes: where to measure.
        dtype: dtype of rows and weights.
        seconds: time after which no further product is begun; what is done is returned.
        rounds: timed calls of each candidate.
        progress: called with a description of the current step.

    Raises:
        UserError: the platform has no kernels with tiles.
    """
    if platform not in _THREADS:
        raise UserError(f"--tune: {platform} has no kernels with tiles\nfix: run it on a GPU")
    started, found = time.monotonic(), list[Tuned]()
    itemsize = jnp.dtype(dtype).itemsize
    now = tiling(platform, itemsize, device)
    speed = _of_large_product(device, platform, dtype)
    when = f"measured on {device.device_kind}, {date.today()}, jax {version('jax')}"
    for shape in shapes:
        block, data = 0, _Data(device, shape, dtype)
        for product in TILED_PRODUCTS:
            if time.monotonic() - started > seconds:
                progress(f"stopped after {seconds:g} s")
                return found
            label = f"{'x'.join(map(str, shape))} {product}"
            progress(f"{label}: compiling")
            best, times, failed = _best(data, platform, product, block, now, rounds)
            tile, used = best
            block = block or tile.rows
            work = 2 * math.prod(shape[1:]) * (2 if product == "gated" else 1)
            entry = TileEntry(
                platform,
                product,
                itemsize,
                tile,
                when,
                device.device_kind,
                shape,
                round(work / times[tile] / speed, 3),
                fuse=None not in times or times[tile] <= _FEW_PERCENT * times[None],
            )
            found.append(Tuned(entry, times[tile], times[used], len(times), failed))
    return found


_Times = dict[ProductTile | None, float]
"""ProductTile -> median seconds; None: gate and up as two products, and their activation."""


def _best(
    data: _Data,
    platform: str,
    product: ProductName,
    block: int,
    now: Tiling,
    rounds: int,
) -> tuple[tuple[ProductTile, ProductTile], _Times, int]:
    """Measure one product; return its best tile and the one used so far, times, and failures."""
    used, itemsize = now.entry(product, data.shape).tile, jnp.dtype(data.dtype).itemsize
    of_forward = now.entry("forward", data.shape).tile
    possible = _candidates(platform, product, itemsize, now.shared_memory)
    tiles: list[ProductTile | None] = [used, *(each for each in possible if each != used)]
    if product == "gated":
        tiles.append(None)

    def block_of(tile: ProductTile | None) -> int:
        return block or (used if tile is None else tile).rows

    operands = {rows: data.operands(rows) for rows in {block_of(tile) for tile in tiles}}

    def prepare(tile: ProductTile | None) -> Callable[[], Array] | None:
        lines = tuple(
            TileEntry(platform, name, itemsize, tile or of_forward, "")
            for name in (product, "forward")
        )
        routine = Triton(block_of(tile), platform, Tiling(lines, itemsize, now.shared_memory))
        given = operands[block_of(tile)]
        try:
            call = jax.jit(_call(routine, product, apart=tile is None)).lower(*given).compile()
            jax.block_until_ready(call(*given))
        except Exception:  # one that does not compile or does not fit is no candidate
            return None
        return lambda: call(*given)

    # A compiler uses a core.
    with ThreadPoolExecutor(8) as pool:
        calls = dict(zip(tiles, pool.map(prepare, tiles), strict=True))
    reference = calls[used]
    if reference is None:
        raise UserError(f"--tune: {product} with the tile {used} does not run on this device")
    expected = data.without_padding(product, reference(), block_of(used))
    running = {}
    for tile, call in calls.items():
        if call is not None:
            found = data.without_padding(product, call(), block_of(tile))
            if float(_difference(found, expected)) <= _MOST_DIFFERENT:
                running[tile] = call
    times: dict[ProductTile | None, list[float]] = {tile: [] for tile in running}
    for _ in range(rounds):
        for tile, call in running.items():
            begun = time.perf_counter()
            jax.block_until_ready([call() for _ in range(3)])
            times[tile].append((time.perf_counter() - begun) / 3)
    medians = {tile: statistics.median(each) for tile, each in times.items()}
    best = min((tile for tile in medians if tile is not None), key=lambda tile: medians[tile])
    return (best, used), medians, len(tiles) - len(running)


def _call(routine: Triton, product: ProductName, *, apart: bool) -> Callable[..., Array]:
    """Return a product as a function of rows, two weights, gradients and sizes of groups."""
    gating = GatingConfig()

    def run(x: Array, gate: Array, up: Array, dy: Array, sizes: Array) -> Array:
        match product:
            case "forward":
                return routine.multiply(x, gate, sizes, transposed=False)
            case "dx":
                return routine.multiply(dy, gate, sizes, transposed=True)
            case "dw":
                return routine.outer(x, dy, sizes)
            case "gated" if apart:
                of_gate = routine.multiply(x, gate, sizes, transposed=False)
                return gated(of_gate, routine.multiply(x, up, sizes, transposed=False), gating)
            case "gated":
                return routine.gated(x, gate, up, (), sizes, gating=gating, keep=False)[0]

    return run


@dataclass(frozen=True, eq=False)
class _Data:
    """Hold the arrays of one shape: groups of uneven sizes, the same whatever they are padded to.

    Attributes:
        device: where the arrays are.
        shape: of the product.
        dtype: of all but the sizes.
    """

    device: jax.Device
    shape: ProductShape
    dtype: DTypeLike

    def operands(self, block: int) -> tuple[Array, ...]:
        """Return rows, two weights, gradients and sizes, groups padded to blocks of zeros."""
        groups, rows, into, out = self.shape
        padded = self._padded(block)
        index = self._index(block)

        def normal(seed: int, *dims: int) -> Array:
            return jax.random.normal(jax.random.key(seed), dims, jnp.dtype(self.dtype))

        def by_rows(seed: int, dim: int) -> Array:
            total = jnp.zeros((int(padded.sum()), dim), self.dtype)
            return total.at[index].set(normal(seed, rows, dim))

        with jax.default_device(self.device):
            weights = [normal(seed, groups, into, out) * into**-0.5 for seed in (2, 3)]
            x, dy = by_rows(0, into), by_rows(1, out)
            return (x, *(w.astype(x.dtype) for w in weights), dy, jnp.asarray(padded, jnp.int32))

    def without_padding(self, product: ProductName, result: Array, block: int) -> Array:
        """Return the rows of a result that are not padding; a gradient of weights as it is."""
        return result if product == "dw" else result[self._index(block)]

    def _sizes(self) -> np.ndarray:
        groups, rows, _, _ = self.shape
        random = np.random.default_rng(0)
        return random.multinomial(rows, random.dirichlet(np.full(groups, 50.0)))

    def _padded(self, block: int) -> np.ndarray:
        return -(-self._sizes() // block) * block

    def _index(self, block: int) -> np.ndarray:
        """Return where each row is, once groups are padded."""
        sizes, padded = self._sizes(), self._padded(block)
        moved = (np.cumsum(padded) - padded) - (np.cumsum(sizes) - sizes)
        return np.arange(sizes.sum()) + np.repeat(moved, sizes)


@jax.jit
def _difference(found: Array, expected: Array) -> Array:
    """Return the largest difference of two arrays over the largest element."""
    wide, other = found.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.max(jnp.abs(wide - other)) / jnp.max(jnp.abs(other))


def _candidates(
    platform: str, product: ProductName, itemsize: int, shared_memory: int
) -> list[ProductTile]:
    """List the tiles that fit the device, and leave a thread neither idle nor out of registers."""
    weights = 2 if product == "gated" else 1
    least, most = _OF_ONE_THREAD
    found = []
    for rows, columns, depth, warps, stages in itertools.product(
        (128, 64, 256),
        (256, 128, 64),
        (size // itemsize for size in _DEPTH_BYTES[platform]),
        (8, 4),
        _STAGES[platform],
    ):
        tile = ProductTile(rows, columns, depth, warps, stages)
        each = rows * columns * weights // (warps * _THREADS[platform])
        if least <= each <= most and tile.shared_bytes(itemsize, weights) <= shared_memory:
            found.append(tile)
    return found


def _of_large_product(device: jax.Device, platform: str, dtype: DTypeLike) -> float:
    """Return the operations per second of the device's own product of two large matrices."""
    size = _SMALL_PRODUCT if platform == "cpu" else _LARGE_PRODUCT
    with jax.default_device(device):
        a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in (0, 1))
        multiply = jax.jit(lambda a, b: a @ b)
        jax.block_until_ready(multiply(a, b))
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            jax.block_until_ready([multiply(a, b) for _ in range(3)])
            times.append((time.perf_counter() - begun) / 3)
    return 2 * size**3 / statistics.median(times)
