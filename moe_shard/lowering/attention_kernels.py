"""Count the FLOPs of attention kernels, which state none, by their names and operands."""

from __future__ import annotations

import math
import re

from moe_shard.lowering.hlo import Computation, Instruction
from moe_shard.lowering.shapes import array_dims

_KERNEL = re.compile(
    r"(?:/attention_(?P<gpu>forward|dq|dkv)/pallas_call|splash_m[hq]a_(?P<tpu>fwd|dq|dkv)_)"
)
_FLOAT = re.compile(r"(?:bf16|f16|f32)\[")
# Products of each kernel: (those that contract or give a query's size, a value's size).
_PRODUCTS = {"forward": (1, 1), "fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def attention_kernel_flops(computation: Computation, instruction: Instruction) -> int:
    """Return the FLOPs of an attention kernel for half of all pairs of tokens; 0 if it is none.

    Half is what a causal mask leaves. Windows and documents leave less: that is not in the program.

    Args:
        computation: where the call is.
        instruction: a call of any kernel.

    Raises:
        HloParseError: the instruction is damaged.
    """
    kernel = _KERNEL.search(instruction.op_name)
    if kernel is None:
        return 0
    on_gpu = kernel["gpu"] is not None
    # On TPU the two tables of blocks come first.
    first = 0 if on_gpu else 2
    shapes = [computation.instruction(instruction.operand(first + at)).shape for at in range(3)]
    if not all(_FLOAT.match(shape) for shape in shapes):
        return 0
    query, key, value = map(array_dims, shapes)
    # [B S N D] on GPU, [B N S D] on TPU, where dims of 1 may be left out.
    pairs = math.prod(query[:-1]) * key[-3 if on_gpu else -2]
    by_query, by_value = _PRODUCTS[kernel["gpu"] or kernel["tpu"]]
    return pairs * (by_query * query[-1] + by_value * value[-1])
