"""Recognize collectives that a compiler implements with other ones.

TPU's partitioner turns a product with a gathered operand into a loop ("windowed einsum"): each
iteration multiplies the shard at hand while the next one is sent around the ring, so that the
program has no all-gather. A product whose result is reduce-scattered is unrolled in the same way:
there the partial sum is sent on, and every iteration adds to it.

TPU7x's SparseCores gather by reducing: every device writes its shard into zeros, and all are added.
Where there is no reduce-scatter (CPU never forms one), an all-reduce is followed by a slice.
"""

from __future__ import annotations

from moe_shard.lowering.hlo import Computation, Instruction, Module
from moe_shard.lowering.op_names import merged_names
from moe_shard.lowering.shapes import shape_bytes, tuple_elements
from moe_shard.lowering.walk import OPCODES

# A ppermute in the source has another op_name; a permute named after a product was unrolled.
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot")
# Opcodes that pass a shard on, including the second half of an async pair. Two shards that arrive
# from both sides are joined by padding and adding (or taking the maximum of) them.
_PASSED_ON = frozenset(
    {"collective-permute-done", "copy", "copy-start", "copy-done", "bitcast", "convert", "pad"}
    | {"reshape", "transpose", "slice", "dynamic-slice", "select", "maximum", "add", "concatenate"}
)
_HANDED_ON = frozenset({"bitcast", "get-tuple-element", "call-done", "all-reduce-done"})
_HOPS = 12
_OUT = "returned"


def is_unrolled(permute: Instruction) -> bool:
    """Return whether a permute belongs to a product that was unrolled around a ring."""
    return any(name.rpartition("/")[2] in _PRODUCTS for name in merged_names(permute.op_name))


def implements(module: Module, computation: Computation, permute: Instruction) -> str:
    """Return what an unrolled permute is a step of, by what happens to the shard that arrives.

    Returns:
        "all-gather" when it is multiplied, "reduce-scatter" when it is only added to; "" when it is
        passed on unchanged, so that another step of the ring decides.
    """
    fates = _fates(module, computation, permute.name, _HOPS) - {_OUT}
    return min(fates, default="")  # "all-gather" first: a product decides before an addition


def _fates(module: Module, computation: Computation, name: str, hops: int) -> set[str]:
    """Return what becomes of a value; `_OUT` when the computation returns it."""
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


def implemented_by_all_reduce(
    module: Module,
    inner: tuple[Computation, Instruction],
    caller: tuple[Computation, Instruction] | None,
    parts: int,
) -> str:
    """Return what an all-reduce implements, judged by its inputs and the use of its output.

    Args:
        module: the program.
        inner: the all-reduce and its computation.
        caller: the instruction that calls it, where it is offloaded.
        parts: devices of a group.

    Returns:
        "all-gather", "reduce-scatter", or "" for a plain one.
    """
    computation, instruction = inner
    operands = [computation.instruction(name) for name in instruction.operands]
    if caller is not None and all(each.opcode == "parameter" for each in operands):
        computation, instruction = caller
        numbers = [each.parameter_number for each in operands]
        operands = [computation.instruction(instruction.operand(number)) for number in numbers]
    if all(_is_shard_in_zeros(module, computation, each, parts) for each in operands):
        return "all-gather"
    return "reduce-scatter" if keeps_one_shard(module, computation, instruction, parts) else ""


def keeps_one_shard(
    module: Module, computation: Computation, reduced: Instruction, parts: int
) -> bool:
    """Return whether every use of a sum keeps only one shard of it, of so many parts."""
    cut = _cuts(module, computation, reduced, parts, _HOPS)
    return bool(cut) and all(cut)


def is_middle_of_async(computation: Computation) -> bool:
    """Return whether a fused computation is the middle of a TPU's async collective.

    Such a collective is started in one fusion and finished in another. The fusions in between
    repeat it next to their own work, and return both its result and its operands.
    """
    root = computation.instruction(computation.root)
    returned = set(root.operands) if root.opcode == "tuple" else set[str]()
    for name in returned:
        if computation.opcodes.get(name) in OPCODES:
            sent = computation.instruction(name).operands
            if returned.issuperset(sent) and all(
                computation.opcodes.get(each) == "parameter" for each in sent
            ):
                return True
    return False


def _is_shard_in_zeros(
    module: Module, computation: Computation, made: Instruction, parts: int
) -> bool:
    whole = shape_bytes(made.shape)
    if made.opcode == "fusion":
        computation = module.called_by(made, "calls")
        made = computation.instruction(computation.root)
    if made.opcode != "dynamic-update-slice":
        return False
    return shape_bytes(computation.instruction(made.operand(1)).shape) * parts == whole


def _cuts(
    module: Module, computation: Computation, value: Instruction, parts: int, hops: int
) -> list[bool]:
    """Return for every use of a value whether it keeps only one shard of it."""
    found: list[bool] = []
    for user in map(computation.instruction, computation.users(value.name) if hops else ()):
        if user.opcode == "dynamic-slice":
            whole = shape_bytes(tuple_elements(value.shape)[0])
            found.append(shape_bytes(user.shape) * parts == whole)
        elif user.opcode == "fusion":
            fused = module.called_by(user, "calls")
            place = user.operands.index(value.name)
            inside = [each for each in fused.parameters() if each.parameter_number == place]
            found += [
                cut for each in inside for cut in _cuts(module, fused, each, parts, hops - 1)
            ] or [False]
        elif user.opcode in _HANDED_ON:
            found += _cuts(module, computation, user, parts, hops - 1)
        else:
            found.append(False)
    return found
