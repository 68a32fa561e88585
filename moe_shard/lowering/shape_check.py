"""Check that the output sizes of a collective match its inputs; damaged sizes are reported."""

from __future__ import annotations

import math

from moe_shard.lowering.hlo import Computation, Instruction
from moe_shard.lowering.shapes import array_dims, tuple_elements


def sizes_fit(
    computation: Computation, instruction: Instruction, kind: str, outputs: str, group_size: int
) -> bool:
    """Compare the numbers of elements; types may differ, as XLA accumulates in wider ones.

    Args:
        computation: the computation that the collective is in.
        instruction: the collective.
        kind: one of `walk.KINDS`.
        outputs: the shape of the output, a tuple where it is several arrays.
        group_size: devices that exchange with each other.
    """
    operands = instruction.operands
    if kind == "ragged-all-to-all":  # the output buffer is its second operand
        operands = operands[1:2]
    elif kind == "collective-permute":  # further operands are an output buffer
        operands = operands[:1]
    shapes = [computation.instruction(name).shape for name in operands]
    taken = [number for shape in shapes for number in _elements(shape)]
    times = group_size if kind == "all-gather" else 1
    parts = group_size if kind == "reduce-scatter" else 1
    given = [number * parts for number in _elements(outputs)]
    return [number * times for number in taken] == given


def _elements(shape: str) -> list[int]:
    """Return the number of elements of each array of a shape."""
    if shape.startswith("("):
        return [number for each in tuple_elements(shape) for number in _elements(each)]
    return [math.prod(array_dims(shape))]
