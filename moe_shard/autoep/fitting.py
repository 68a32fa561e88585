"""Check that tensors and parameters fit together as planned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from moe_shard.autoep.host_blocks import Index, ParamPath
from moe_shard.autoep.tensor_plan import Piece, TensorPlan
from moe_shard.errors import UserError


def pieces_by_param(
    plan: TensorPlan, tensors: Iterable[str]
) -> dict[ParamPath, dict[Index, Piece]]:
    """Group the pieces of each parameter by their index.

    Args:
        plan: the plan of a checkpoint.
        tensors: names of the tensors in it.

    Raises:
        UserError: the plan has other tensors, or fills a part twice.
    """
    written = {piece.tensor for piece in (*plan.pieces, *plan.copies)}
    same_names("tensor", tensors, written | {*plan.carried})
    found: dict[ParamPath, dict[Index, Piece]] = {}
    for piece in plan.pieces:
        of_param = found.setdefault(piece.param, {})
        if piece.index in of_param:
            raise UserError(
                f"{'.'.join(piece.param)}{list(piece.index)} is filled by tensor {piece.tensor} "
                f"and by {of_param[piece.index].tensor}\nfix: the family's patterns name it twice"
            )
        of_param[piece.index] = piece
    return found


def same_names(what: str, here: Iterable[str], planned: Iterable[str]) -> None:
    """Refuse a plan with other tensors or parameters.

    Raises:
        UserError: a name is here or planned, but not both.
    """
    here, planned = set(here), set(planned)
    if odd := sorted(here ^ planned):
        raise UserError(
            f"{what} {odd[0]} is {'of no' if odd[0] in here else 'in the'} plan"
            f"{'' if odd[0] in here else ' and not there'} ({len(odd)} such)\n"
            "fix: a family whose patterns take each tensor, or another checkpoint"
        )


def seen(piece: Piece, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a view of a tensor, or of the memory for one, in its parameter's layout.

    Args:
        piece: the part of the tensor, and the parameter.
        tensor: the tensor as in its file.
        shape: shape of the parameter.

    Raises:
        UserError: it has another shape.
    """
    fix = "fix: the checkpoint and its config.json have to be of one model"
    of = (
        f"tensor {piece.tensor} of shape {list(tensor.shape)} is no part of {'.'.join(piece.param)}"
    )
    try:
        found = piece.layout.view(tensor)
    except (ValueError, IndexError) as error:
        raise UserError(f"{of}: {error}\n{fix}") from error
    wanted = shape[len(piece.index) :]
    if found.shape != wanted:
        raise UserError(
            f"{of}: there it would be {list(found.shape)}, and should be {list(wanted)}\n{fix}"
        )
    return found


@contextmanager
def naming(piece: Piece) -> Iterator[None]:
    """Name the tensor and the parameter in errors about numbers that the block raises.

    Raises:
        UserError: a number is too large for its dtype.
    """
    try:
        yield
    except FloatingPointError as error:
        raise UserError(
            f"a number is too large for float16: tensor {piece.tensor}, parameter "
            f"{'.'.join(piece.param)}\nfix: weight_dtype=bfloat16 or float32"
        ) from error
