"""Evaluate custom calls: library products, kernels, and annotations."""

from __future__ import annotations

import re

from moe_shard.lowering.dims import LIBRARY_PRODUCT
from moe_shard.lowering.flow.evaluation import Evaluation, OpcodeRule
from moe_shard.lowering.flow.products import dense_product, mapped, takes_tokens
from moe_shard.lowering.flow.states import (
    CONSTANT,
    EXPERT_GRADIENT,
    EXPERT_OUTPUT,
    FEATURE,
    INDICES,
    ROUTED,
    State,
    Value,
    flat,
    is_float,
    join,
    join_operands,
    shaped,
)
from moe_shard.lowering.hlo import Computation, Instruction
from moe_shard.lowering.shapes import array_dims, tuple_elements

_CONSTANT_TARGETS = re.compile(r'custom_call_target="(?:AllocateBuffer|GetRngState)"')
# These return their operands.
_SAME_TARGETS = re.compile(
    r'custom_call_target="(?:Sharding|SPMD\w+|AsyncCollective\w+|annotate_device_placement'
    r"|LayoutConstraint|MoveTo(?:Host|Device)|Pin|Unpin|ConcatBitcast|BitcastFusion"
    r'|xla\.sdy\.\w+|PadToStatic|SliceToDynamic)"'
)
_TOP_K = re.compile(r'custom_call_target="(?:TopK|__gpu\$TopK|\w*[Tt]op_?[Kk]\w*)"')


def _custom_call(
    run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    text = instruction.attribute_text
    if _CONSTANT_TARGETS.search(text):
        return shaped(CONSTANT, instruction.shape)
    if _SAME_TARGETS.search(text):
        if len(operands) == 1:
            return operands[0]
        return shaped(join_operands(operands), instruction.shape)
    if LIBRARY_PRODUCT.search(text):
        return dense_product(run, computation, instruction, operands)
    if _TOP_K.search(text):
        state = flat(operands[0])
        return [state, state._replace(origin=None, marks=state.marks | INDICES)]
    return shaped(_kernel(run, computation, instruction, operands), instruction.shape)


def _kernel(
    run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> State:
    """Evaluate a kernel whose arithmetic is not in the text: a grouped product, or anything else.

    A kernel with routed data and a parameter that has an expert dim before a matrix is a product of
    experts; it may have several such parameters, such as gate and up. One with two routed operands
    and the integer sizes of its groups, whose result is a stack of matrices, computes the gradient
    of such a parameter.
    """
    states = [flat(each) for each in operands]
    merged = join(states) if states else CONSTANT
    shapes = [computation.instruction(name).shape for name in instruction.operands]
    numbers = [
        (state, shape)
        for state, shape in zip(states, shapes, strict=True)
        if is_float(shape) and not shape.startswith("(")
    ]
    tokens = [state for state, _ in numbers if state.origin is None and run.are_tokens(state)]
    groups = any(state.marks & INDICES for state in states)
    of_experts = False
    for state, shape in numbers:
        if not tokens or not takes_tokens(run, state, tokens[0]):
            continue
        assert state.origin is not None
        dims = tuple(run.flow.experts.get(state.origin.main, ()))
        split = run.flow.parameters[state.origin.main].split
        if not dims and (len(array_dims(shape)) < 3 or not (groups or split)):
            continue
        dims = dims or mapped(state, (0,)) or (0,)
        run.found_experts((computation.name, instruction.name), state, dims, join(tokens))
        of_experts = True
    if of_experts:
        rank = len(array_dims(tuple_elements(instruction.shape)[0]))
        feature = (*((),) * (rank - 1), (FEATURE,))
        return State(merged.deps, None, ROUTED | EXPERT_OUTPUT, join(tokens).via, feature)
    result = tuple_elements(instruction.shape)[0]
    if groups and len(tokens) > 1 and len(array_dims(result)) > 2 and is_float(result):
        run.flow.gradients.add((computation.name, instruction.name))
        return State(merged.deps, None, EXPERT_GRADIENT, 0)
    for state, _ in numbers:
        if state.origin is not None and state.origin.main >= 0:
            run.flow.opaque |= state.origin.params
    origin = merged.origin if merged.origin is not None and not merged.origin.params else None
    return State(merged.deps, origin, merged.marks, merged.via)


KERNEL_RULES: dict[str, OpcodeRule] = {"custom-call": _custom_call}
