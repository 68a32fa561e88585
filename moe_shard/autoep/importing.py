"""Read tensors of a checkpoint into parameters that are sharded over a mesh.

A plan says which part of which parameter each tensor fills. Tensors are read in parts: for a
stack of layers the host holds one layer's part of one shard, never the stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from moe_shard.autoep.dequantize import numbers
from moe_shard.autoep.fitting import naming, pieces_by_param, same_names, seen
from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.host_blocks import Bounds, Index, ParamPath, leaves_of
from moe_shard.autoep.quantized import Quantized
from moe_shard.autoep.sharded_reads import Progress, read_sharded, rounding_lines
from moe_shard.autoep.tensor_plan import Piece, Take, TensorPlan
from moe_shard.autoep.tensors import DTYPES, copy, is_exact, view
from moe_shard.errors import UserError
from moe_shard.models.params import Params

_BLOCK = 16 * 2**20
"""Bytes that are assembled on the host and sent at once, unless a tensor's part is larger."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def import_params(
    plan: TensorPlan,
    headers: Mapping[str, TensorHeader],
    specs: Params,
    *,
    say: Callable[[str], object] = lambda _: None,
    progress: Progress = lambda _done, _all: None,
) -> Params:
    """Read parameters onto this process's devices, each device its own shards.

    The values are the checkpoint's in the parameters' dtypes. A wider dtype holds them exactly; a
    narrower one is reported.

    Args:
        plan: which tensor fills which part of which parameter.
        headers: where the tensors are.
        specs: the parameters' specs: leaves with a shape, a dtype and a sharding.
        say: receives a line on numbers that are rounded.
        progress: called as bytes arrive on this process's devices.

    Raises:
        UserError: the plan does not fill each element of each parameter once, a tensor is missing
            or has another shape or an integer dtype, or its file cannot be read.
    """
    leaves = dict(leaves_of(specs))
    pieces = _by_param(plan, headers, leaves)
    _report_rounding(pieces, headers, leaves, say)
    return read_sharded(specs, lambda path, leaf: _Reader(leaf, pieces[path], headers), progress)


def _by_param(
    plan: TensorPlan, headers: Mapping[str, TensorHeader], leaves: Mapping[ParamPath, Any]
) -> dict[ParamPath, dict[Index, Piece]]:
    """Group the pieces of each parameter by index; together they fill it, each part once."""
    found = pieces_by_param(plan, headers)
    same_names("parameter", map(".".join, leaves), map(".".join, found))
    for path, of_param in found.items():
        shape = leaves[path].shape
        depth = len(next(iter(of_param)))
        wanted = set(np.ndindex(shape[:depth]))
        if odd := wanted ^ of_param.keys():
            raise UserError(
                f"{'.'.join(path)}, of shape {shape}: the checkpoint "
                f"{'lacks' if min(odd) in wanted else 'has another'} part {list(min(odd))}\n"
                "fix: the checkpoint's number of layers and experts has to be the model's"
            )
    return found


def _report_rounding(
    pieces: Mapping[ParamPath, Mapping[Index, Piece]],
    headers: Mapping[str, TensorHeader],
    leaves: Mapping[ParamPath, Any],
    say: Callable[[str], object],
) -> None:
    rounded: dict[tuple[str, str], list[str]] = {}
    for path, of_param in pieces.items():
        dtype = np.dtype(leaves[path].dtype)
        for piece in of_param.values():
            entry = headers[piece.tensor]
            if entry.dtype not in _FLOATS:
                raise UserError(
                    f"tensor {piece.tensor} is {entry.dtype}, not numbers of {dtype.name}\n"
                    "fix: a checkpoint that is not quantized"
                )
            if not is_exact(DTYPES[entry.dtype], dtype):
                key = DTYPES[entry.dtype].name, dtype.name
                rounded.setdefault(key, []).append(piece.tensor)
    for line in rounding_lines(rounded):
        say(line)


class _Reader:
    """Read the shards of one parameter.

    Args:
        leaf: the parameter's spec.
        pieces: the pieces that fill it, by index.
        headers: where their tensors are.
    """

    def __init__(
        self, leaf: Any, pieces: Mapping[Index, Piece], headers: Mapping[str, TensorHeader]
    ) -> None:
        self.shape, self.dtype = leaf.shape, np.dtype(leaf.dtype)
        self.pieces, self.headers = pieces, headers
        self.depth = len(next(iter(pieces)))

    def blocks(self, bounds: Bounds) -> Iterator[tuple[Bounds, np.ndarray]]:
        """Read one shard in blocks.

        Args:
            bounds: the shard's bounds in the parameter.
        """
        shape = tuple(high - low for low, high in bounds)
        outer = self._outer_dims(shape)
        for index in np.ndindex(shape[:outer]):
            lows = [low + at for (low, _), at in zip(bounds, index, strict=False)]
            within = (*((low, low + 1) for low in lows), *bounds[outer:])
            yield within, self._block(bounds, index)[(None,) * outer]

    def _outer_dims(self, shape: tuple[int, ...]) -> int:
        """Return how many leading dims are iterated over to keep blocks small."""
        size = self.dtype.itemsize
        fits = (d for d in range(self.depth) if math.prod(shape[d:]) * size <= _BLOCK)
        return next(fits, self.depth)

    def _block(self, bounds: Bounds, outer: Index) -> np.ndarray:
        """Read a shard's part at an index of its leading dims, on the host."""
        lows = [low for low, _ in bounds]
        shape = tuple(high - low for low, high in bounds)[len(outer) :]
        block = np.empty(shape, self.dtype)
        within = tuple(slice(*part) for part in bounds[self.depth :])
        for inner in np.ndindex(shape[: self.depth - len(outer)]):
            index = tuple(map(sum, zip(lows, (*outer, *inner), strict=False)))
            piece = self.pieces[index]
            with naming(piece):
                for at, part in self._parts(piece, within):
                    copy(block[(*inner, *at, ...)], part)
        return block

    def _parts(self, piece: Piece, within: Take) -> Iterator[tuple[Index, np.ndarray]]:
        """Read the part of a piece that a shard holds, in the parameter's layout.

        A plain tensor is viewed in its file, all at once. Quantized numbers are decoded, one expert
        at a time if the tensor holds all experts.

        Args:
            piece: a piece of the parameter.
            within: the part of it that the shard holds.

        Yields:
            The part's indices in the shard's leading dims, and the part.
        """
        entry = self.headers[piece.tensor]
        whole: Any = (*within, ...)
        if not isinstance(entry, Quantized):
            yield (), seen(piece, view(entry), self.shape)[whole]
            return
        seen(piece, np.broadcast_to(np.float32(0), entry.shape), self.shape)
        layout = piece.layout
        if len(entry.shape) == 3 and layout.keeps_first:
            for at, expert in enumerate(range(*within[0].indices(entry.shape[0]))):
                one = numbers(entry, (slice(expert, expert + 1), *layout.take[1:]))
                yield (at,), layout.arrange(one)[0][whole[1:]]
        else:
            yield (), layout.arrange(numbers(entry, layout.take))[whole]
