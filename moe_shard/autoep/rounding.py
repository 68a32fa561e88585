"""Round numbers to a narrower dtype, to nearest or by chance, and count those that change."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_shard.autoep.host_blocks import Bounds, Index
from moe_shard.autoep.tensors import is_exact

_AT_ONCE = 2**20
"""Elements whose places and chances are computed at once; they take eight bytes each."""


class Rounding:
    """Round numbers to a tensor's dtype, and count them.

    Without a seed to the nearest number, ties to even. With one to either of the two numbers
    around, each with the probability with which the mean stays what it was (stochastic rounding).
    The draw follows from the seed, the parameter and the place in it alone: chunks, meshes and
    copies of a tensor do not change it.

    Attributes:
        seed: of the draws; None: to nearest.
        rounded: number of values that changed.
        values: number of values that were to be rounded, exact ones included.
        dtypes: dtypes that they were rounded to, in the order in which they came.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.rounded = self.values = 0
        self.dtypes: list[str] = []

    def to(
        self,
        values: np.ndarray,
        dtype: np.dtype[Any],
        *,
        param: Sequence[str],
        index: Index,
        bounds: Bounds,
        shape: tuple[int, ...],
        counts: bool = True,
    ) -> np.ndarray:
        """Return numbers in a dtype; the same array where it holds every number of theirs.

        Args:
            values: a part of a parameter.
            dtype: what to round to.
            param: the parameter's path.
            index: the part's indices in the parameter's leading dims.
            bounds: its bounds in the other dims.
            shape: the parameter's shape.
            counts: whether they are counted; a copy of what was counted is not.

        Raises:
            FloatingPointError: a number is too large for float16.
        """
        if is_exact(values.dtype, dtype):
            return values
        with np.errstate(over="raise"):
            # In memory order, whichever dim that is: a cast in stripes takes twice the time.
            near = values.astype(dtype, order="K")
        if self.seed is not None:
            seed = zlib.crc32(".".join(param).encode(), self.seed)
            steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
            first = sum(at * step for at, step in zip(index, steps, strict=False))
            own = steps[len(index) :]
            first += sum(low * step for (low, _), step in zip(bounds, own, strict=True))
            _draw(values, near, seed, first, own)
        if counts:
            self.values += values.size
            self.rounded += int(np.count_nonzero(near.astype(values.dtype) != values))
            if dtype.name not in self.dtypes:
                self.dtypes.append(dtype.name)
        return near

    def line(self) -> str:
        """Say what was rounded, and how."""
        if not self.rounded:
            return "no value had to be rounded"
        how = (
            "to nearest, ties to even"
            if self.seed is None
            else f"stochastically, from seed {self.seed}"
        )
        return (
            f"{self.rounded:,} of {self.values:,} values were rounded to "
            f"{' and '.join(self.dtypes)}, {how}; the others are exact"
        )


def _draw(
    values: np.ndarray, near: np.ndarray, seed: int, first: int, steps: Sequence[int]
) -> None:
    """Replace each nearest number by the one on the value's other side, by chance.

    Args:
        values: what is rounded.
        near: their nearest numbers; changed in place.
        seed: of the draws.
        first: place of the first value in the parameter, counted in elements.
        steps: elements from one value to the next along each dim.
    """
    if values.ndim > 1 and values.size > _AT_ONCE:
        for row in range(values.shape[0]):
            _draw(values[row], near[row], seed, first + row * steps[0], steps[1:])
        return
    place: np.ndarray = np.full((), first, np.uint64)
    for size, step in zip(values.shape, steps, strict=True):
        place = place[..., None] + np.arange(size, dtype=np.uint64) * np.uint64(step)
    wide = np.float64 if values.dtype.itemsize > 4 else np.float32
    exact: Any = values.astype(wide)
    nearest: Any = near.astype(wide)
    toward = np.where(exact > nearest, np.inf, -np.inf).astype(near.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        other = np.nextafter(near, toward)
        share = np.abs(exact - nearest) / np.abs(other.astype(wide) - nearest)
        # Never to infinity.
        moves = (_uniform(place, seed) < share) & np.isfinite(other.astype(wide))
    np.copyto(near, other, where=moves)


def _uniform(place: np.ndarray, seed: int) -> np.ndarray:
    """Return a number in [0, 1) for each place: splitmix64's mixing of a counter (Steele 2014)."""
    with np.errstate(over="ignore"):
        x = (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed) * np.uint64(
            0xD1B54A32D192ED03
        )
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    numbers: np.ndarray = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers
