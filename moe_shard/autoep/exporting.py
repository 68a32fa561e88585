"""Write parameters into the tensors of a checkpoint, a block at a time; the reverse of `importing`.

Blocks may come in any order. Each is written to its place in the files immediately, so that no more
than one block is held in memory.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_shard.autoep.fitting import naming, pieces_by_param, seen
from moe_shard.autoep.headers import DTYPE_BYTES, TensorHeader
from moe_shard.autoep.host_blocks import HostBlock, Index, ParamPath
from moe_shard.autoep.rounding import Rounding
from moe_shard.autoep.tensor_plan import Piece, TensorPlan
from moe_shard.autoep.tensors import copy, writable
from moe_shard.errors import UserError


def export_params(
    plan: TensorPlan,
    headers: Mapping[str, TensorHeader],
    blocks: Iterable[HostBlock],
    *,
    rounding: Rounding | None = None,
    progress: Callable[[int, int], object] = lambda _done, _all: None,
) -> None:
    """Write parameters into a checkpoint's files, which have their full lengths.

    Each tensor keeps its own dtype, so that what was imported is written bit for bit; trained
    parameters in a wider one are rounded. The caller writes the tensors that the plan only carries.

    Args:
        plan: which tensor takes which part of which parameter.
        headers: where each tensor goes.
        blocks: all parts of all parameters.
        rounding: rounds to narrower dtypes, and counts; None: to nearest.
        progress: called with the bytes written and all bytes.

    Raises:
        UserError: a tensor or parameter is not in the plan, or is left incomplete by it; a number
            is too large for its dtype.
        OSError: the disk is too small for the files.
    """
    rounding = rounding or Rounding()
    pieces = pieces_by_param(plan, headers)
    copies: dict[tuple[ParamPath, Index], list[Piece]] = {}
    for copy_of in plan.copies:
        copies.setdefault((copy_of.param, copy_of.index), []).append(copy_of)
    used = {piece.tensor for piece in (*plan.pieces, *plan.copies)}
    for file in {headers[name].file for name in used}:
        reserve(file)
    total = sum(headers[name].nbytes for name in used)
    done, filled = 0, Counter[str]()
    for block in blocks:
        of_param = pieces.get(block.param)
        if of_param is None:
            raise UserError(
                f"parameter {'.'.join(block.param)} is of no tensor\n"
                "fix: another checkpoint, or a family whose patterns take each tensor"
            )
        depth = len(next(iter(of_param)))
        lows = [low for low, _ in block.bounds]
        for at in np.ndindex(block.values.shape[:depth]):
            index = tuple(map(sum, zip(lows, at, strict=False)))
            first = _piece(of_param, index, block)
            for piece in (first, *copies.get((block.param, index), ())):
                entry = headers[piece.tensor]
                size = _write(piece, entry, block, at, rounding, counts=piece is first)
                filled[piece.tensor] += size
                done += size * DTYPE_BYTES[entry.dtype]
        # Otherwise it would stay in memory while the next one is read.
        del block
        progress(done, total)
    # A tensor that is carried too is read in part; the rest of it is as it was.
    for name in used - {*plan.carried}:
        size = math.prod(headers[name].shape)
        if filled[name] != size:
            raise UserError(
                f"tensor {name}: {filled[name]} of its {size} elements are in parameters\n"
                "fix: the family's patterns have to take all of it"
            )


def _piece(of_param: Mapping[Index, Piece], index: Index, block: HostBlock) -> Piece:
    if index not in of_param:
        raise UserError(
            f"{'.'.join(block.param)}, of shape {block.shape}: no tensor has part {list(index)}\n"
            "fix: the checkpoint's number of layers and experts has to be the model's"
        )
    return of_param[index]


def _write(
    piece: Piece, entry: TensorHeader, block: HostBlock, at: Index, rounding: Rounding, counts: bool
) -> int:
    """Write a part of a block to its place in the tensor; return the number of its elements."""
    here: Any = (*at, ...)
    part = block.values[here]
    bounds = block.bounds[len(piece.index) :]
    within: Any = (*(slice(*bound) for bound in bounds), ...)
    target = seen(piece, writable(entry), block.shape)[within]
    with naming(piece):
        copy(
            target,
            rounding.to(
                part,
                target.dtype,
                param=block.param,
                index=piece.index,
                bounds=bounds,
                shape=block.shape,
                counts=counts,
            ),
        )
    return part.size


def reserve(file: Path) -> None:
    """Reserve the disk space that a file needs, which has its full length.

    The file is written through a memory map, where a full disk causes a signal and not an error.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with file.open("r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, max(file.stat().st_size, 1))
