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
# What leaves a value the value it is; the second half of an async pair too.
_PASSED_ON = frozenset(
    {"collective-permute-done", "copy", "copy-start", "copy-done", "bitcast", "convert"}
    | {"reshape", "transpose", "slice", "dynamic-slice", "select", "pad"}
)
_HOPS = 12


def is_unrolled(permute: Instruction) -> bool:
    """Whether a permute belongs to a product that was unrolled around a ring."""
    return any(name.rpartition("/")[2] in _PRODUCTS for name in merged_names(permute.op_name))


def implements(module: Module, computation: Computation, permute: Instruction) -> str:
    """What an unrolled permute is a step of, by what happens to the shard that arrives.

    Returns:
        "reduce-scatter" when it is added to, "all-gather" when it is multiplied; "" when it only
        travels on, so that another step of the ring has to tell.
    """
    return _fate(module, computation, permute.name, _HOPS)


def _fate(module: Module, computation: Computation, name: str, hops: int) -> str:
    fates = set[str]()
    for user in map(computation.instruction, computation.users(name) if hops else ()):
        if user.opcode == "add" and user.shape.startswith(("f", "bf")):  # integers are indices
            fates.add("reduce-scatter")
        elif user.opcode in ("dot", "convolution"):
            fates.add("all-gather")
        elif user.opcode == "fusion":
            fused = module.called_by(user, "calls")
            place = user.operands.index(name)
            inner = (each for each in fused.parameters() if each.parameter_number == place)
            fates |= {_fate(module, fused, each.name, hops - 1) for each in inner}
        elif user.opcode in _PASSED_ON:
            fates.add(_fate(module, computation, user.name, hops - 1))
    return max(fates, default="")  # an addition tells more than a product: "r" comes after "a"
