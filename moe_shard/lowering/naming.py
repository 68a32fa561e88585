"""Find the op_name that shows what a collective is for: its own, or that of a neighbour."""

from __future__ import annotations

from collections.abc import Callable

from moe_shard.lowering.hlo import Computation, Instruction
from moe_shard.lowering.op_names import classify, merged_names
from moe_shard.lowering.shapes import shape_bytes, tuple_elements
from moe_shard.lowering.sites import Site, outputs

_OP_NAME_HOPS = 6
_LEAST_SHARE = 0.01
"""An operand with a smaller fraction of a merged collective's bytes does not decide its stage."""


def dominant_op_names(op_name: str, site: Site) -> str:
    """Return the op_names of merged operands that carry at least 1 % of the bytes.

    Otherwise a few bytes of token counts would decide the stage of an attention weight.
    """
    names = merged_names(op_name)
    sizes = [shape_bytes(each) for each in tuple_elements(outputs(site))]
    if len(names) == 1 or len(names) != len(sizes):
        return op_name
    least = _LEAST_SHARE * sum(sizes)
    return ";".join(name for name, size in zip(names, sizes, strict=True) if size >= least)


def stage_of_exchange(site: Site, pass_: str) -> str:
    """Return dispatch or combine for an unnamed exchange next to the experts.

    GPU's compiler drops the names of ragged exchanges. In the forward pass, tokens go to the
    experts in dispatch and come back in combine; gradients move in the opposite direction.
    """
    made = _nearest(site.computation, site.instruction, _producers)
    from_experts = made is not None and classify(made.op_name)[0] == "experts"
    return "combine" if from_experts == (pass_ != "backward") else "dispatch"


def named_instruction(site: Site) -> Instruction | None:
    """Return the instruction whose op_name shows what a collective is for.

    That is the collective or its caller. XLA drops the op_name of collectives that it merges, moves
    or inserts; then the nearest producer's is used, or, where that belongs to no stage of the
    model, the nearest consumer's: a weight is gathered for the product that uses it.
    """
    if site.instruction.op_name:
        return site.instruction
    if site.caller is not None and site.caller[1].op_name:
        return site.caller[1]
    ends = [(site.computation, site.instruction)]
    if site.caller is not None:
        ends.append(site.caller)
    made_by = next(filter(None, (_nearest(*end, _producers) for end in ends)), None)
    if made_by is not None and classify(made_by.op_name)[0] != "other":
        return made_by
    used_by = next(filter(None, (_nearest(*end, _consumers) for end in reversed(ends))), None)
    return used_by or made_by


def _nearest(
    computation: Computation,
    first: Instruction,
    around: Callable[[Computation, Instruction], list[str]],
) -> Instruction | None:
    """Return the nearest instruction with an op_name, a few hops to one side."""
    found = [first]
    for _ in range(_OP_NAME_HOPS):
        names = dict.fromkeys(name for each in found for name in around(computation, each))
        found = [computation.instruction(name) for name in names]
        for each in found:
            if each.opcode != "constant" and each.op_name:
                return each
    return None


def _producers(_computation: Computation, instruction: Instruction) -> list[str]:
    if instruction.opcode.startswith("ragged-all-to-all"):
        return instruction.operands[:1]  # the tokens; the others are offsets and sizes
    return instruction.operands


def _consumers(computation: Computation, instruction: Instruction) -> list[str]:
    return computation.users(instruction.name)
