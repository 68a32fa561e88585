"""What a ring of collective-permutes stands for.

TPU's partitioner turns a product with a gathered operand into a loop ("windowed einsum"): each
round multiplies the shard that is there while the next one travels the ring, so an all-gather is
never seen in the program. A product whose result is reduce-scattered is unrolled likewise: there
the sum travels, and every round adds to it.
"""

from __future__ import annotations

from moe_shard.lowering.hlo import Computation, Instruction, Module
from moe_shard.lowering.op_names import merged_names

# Programmers write ppermute, whose op_name ends so; a product that has permutes was unrolled.
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot")
# What a shard goes through on its way; the second half of an async pair too. Two shards that come
# from both sides are put together by padding and adding (or taking the maximum of) them.
_PASSED_ON = frozenset(
    {"collective-permute-done", "copy", "copy-start", "copy-done", "bitcast", "convert", "pad"}
    | {"reshape", "transpose", "slice", "dynamic-slice", "select", "maximum", "add", "concatenate"}
)
_HOPS = 12
_OUT = "returned"


def is_unrolled(permute: Instruction) -> bool:
    """Whether a permute belongs to a product that was unrolled around a ring."""
    return any(name.rpartition("/")[2] in _PRODUCTS for name in merged_names(permute.op_name))


def implements(module: Module, computation: Computation, permute: Instruction) -> str:
    """What an unrolled permute is a step of, by what happens to the shard that arrives.

    Returns:
        "all-gather" when it is multiplied, "reduce-scatter" when it is only added to; "" when it
        travels on as it is, so that another step of the ring has to tell.
    """
    fates = _fates(module, computation, permute.name, _HOPS) - {_OUT}
    return min(fates, default="")  # by the alphabet: a product tells more than an addition


def _fates(module: Module, computation: Computation, name: str, hops: int) -> set[str]:
    """What becomes of a value; `_OUT` when it is what the computation returns."""
    fates = {_OUT} if name == computation.root else set[str]()
    for user in map(computation.instruction, computation.users(name) if hops else ()):
        goes_on = user.opcode in _PASSED_ON
        if user.opcode in ("dot", "convolution"):
            fates.add("all-gather")
        elif user.opcode == "add" and user.shape.startswith(("f", "bf")):  # else an index
            fates.add("reduce-scatter")
        elif user.opcode == "fusion":
            fused = module.called_by(user, "calls")
            place = user.operands.index(name)
            for parameter in fused.parameters():
                if parameter.parameter_number == place:
                    inside = _fates(module, fused, parameter.name, hops - 1)
                    fates |= inside - {_OUT}
                    goes_on = goes_on or _OUT in inside
        if goes_on:
            fates |= _fates(module, computation, user.name, hops - 1)
    return fates
