"""Evaluate arithmetic: where a router's comparisons become indices and masks."""

from __future__ import annotations

import math
import re

from moe_shard.lowering import dims as following
from moe_shard.lowering.flow.evaluation import Evaluation, OpcodeRule
from moe_shard.lowering.flow.states import (
    COMPARED,
    EXPERT_GRADIENT,
    EXPERT_OUTPUT,
    GRADIENT,
    INDICES,
    MASK,
    ON_TOKENS,
    ROUTED,
    UPDATED,
    State,
    Value,
    flat,
    holds_data,
    is_computed,
    is_float,
    join,
    join_operands,
    shaped,
    with_dims,
)
from moe_shard.lowering.hlo import Computation, Instruction
from moe_shard.lowering.shapes import array_dims


def elementwise(
    _run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """Join the operands: the rule of every opcode that has none of its own."""
    return shaped(join_operands(operands), instruction.shape)


def _score(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """Record the size of an exponential or a sigmoid: a router has one score per expert."""
    state = join_operands(operands)
    if is_computed(state) and not state.marks & GRADIENT and instruction.shape[0] != "(":
        run.flow.scored.update(array_dims(instruction.shape)[-1:])
    # A score is no token: attention to chosen tokens masks scores, and what it gives is not routed.
    return shaped(state._replace(marks=state.marks & ~ON_TOKENS), instruction.shape)


def _add(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """Add: routed data plus a residual is no longer routed, plus a bias it still is."""
    states = [flat(each) for each in operands]
    merged = join(states)
    if not is_float(instruction.shape):
        return merged
    size = math.prod(array_dims(instruction.shape)) if instruction.shape[0] != "(" else 0
    computed = [state for state in states if is_computed(state) or _is_as_large(run, state, size)]
    if len(computed) == 2 and not all(state.marks & ROUTED for state in computed):
        # A sum of gradients keeps their collectives; a sum with a residual does not.
        via = merged.via if merged.marks & (GRADIENT | EXPERT_GRADIENT) else 0
        merged = merged._replace(marks=merged.marks & ~ON_TOKENS, via=via)
    elif len(computed) == 1:
        parameters = [state for state in states if state.origin is not None and state.origin.params]
        if parameters and computed[0].marks & (EXPERT_GRADIENT | GRADIENT):
            merged = merged._replace(marks=merged.marks | UPDATED)
        elif parameters and computed[0].marks & EXPERT_OUTPUT:
            run.found_bias(parameters[0], size)
    return merged


def _is_as_large(run: Evaluation, state: State, size: int) -> bool:
    """Return whether a value is an input of as many elements, and no weight or bias."""
    if state.origin is None or state.origin.main < 0:
        return False
    parameter = run.flow.parameters[state.origin.main]
    return math.prod(parameter.global_sizes) >= size > 1 and not run.is_like_a_weight(parameter)


def _multiply(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """Multiply: a mask times data routes the data; a mask times combine weights is still a mask."""
    states = [flat(each) for each in operands]
    merged = join(states)
    if not is_float(instruction.shape):
        return merged
    for mask, data, name in zip(states, states[::-1], instruction.operands, strict=False):
        if mask.marks & MASK and not data.marks & MASK and holds_data(data):
            marks = merged.marks | ROUTED
            if data.marks & ROUTED or _is_spread(computation, name):
                marks &= ~MASK
            return merged._replace(marks=marks, via=data.via)
    # Combine weights, one number per vector, came through other collectives than the vectors.
    sizes = [_own_size(computation, name) for name in instruction.operands]
    vectors = [state for state, size in zip(states, sizes, strict=True) if size == max(sizes)]
    tokens = [state for state in vectors if state.marks & ROUTED] or vectors
    return merged._replace(via=join(tokens).via)


def _is_spread(computation: Computation, name: str) -> bool:
    """Return whether a value is broadcast along a dim of what it multiplies."""
    shape = computation.instruction(name).shape
    return _own_size(computation, name) < math.prod(array_dims(shape))


def _own_size(computation: Computation, name: str) -> int:
    """Return how many elements a value had before it was broadcast."""
    for _ in range(4):
        made = computation.instruction(name)
        if made.opcode == "broadcast":
            return math.prod(array_dims(computation.instruction(made.operand(0)).shape))
        if made.opcode not in ("convert", "bitcast", "reshape", "copy") or not made.operands:
            break
        name = made.operand(0)
    return math.prod(array_dims(made.shape))


def _compare(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    merged = join_operands(operands)
    marks = merged.marks
    if marks & (INDICES | MASK):
        return merged._replace(marks=MASK, via=0)
    shape = computation.instruction(instruction.operand(0)).shape
    compared = is_float(shape) and holds_data(merged)
    return merged._replace(marks=COMPARED if compared else marks & COMPARED)


def _convert(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    state = flat(operands[0])
    before = computation.instruction(instruction.operand(0)).shape
    if before.startswith("pred") and state.marks & COMPARED:
        return state._replace(marks=(state.marks & ~COMPARED) | MASK)
    if is_float(instruction.shape) and state.marks & INDICES:
        return state._replace(marks=state.marks | MASK)
    narrow = re.match(r"[su](2|4|8)\[", instruction.shape)  # quantized numbers, not positions
    if is_float(before) and not is_float(instruction.shape) and is_computed(state) and not narrow:
        return state._replace(marks=state.marks | INDICES, via=0)
    return state


def _reinterpreted(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """Follow the bits of floats as integers, which a compiler sorts in their place, and back."""
    state = flat(operands[0])
    was_float = is_float(computation.instruction(instruction.operand(0)).shape)
    if was_float and not is_float(instruction.shape) and is_computed(state):
        return state._replace(marks=state.marks | INDICES, via=0)
    if is_float(instruction.shape) and not was_float:
        return state._replace(marks=state.marks & ~INDICES)
    return state


def _select(
    _run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    chooser, *chosen = (flat(each) for each in operands)
    merged = join([chooser, *chosen])._replace(via=join(chosen).via)
    marks = 0
    for state in chosen:
        marks |= state.marks
    if chooser.marks & MASK:
        data = any(holds_data(state) for state in chosen)
        if not is_float(instruction.shape):
            marks |= INDICES
        else:
            marks |= ROUTED if data else MASK
    elif chooser.marks & COMPARED and not is_float(instruction.shape):
        marks |= COMPARED if instruction.shape.startswith("pred") else INDICES
    return merged._replace(marks=marks)


def _reduce(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """Reduce, also pairs: an argmax reduces scores and their positions together."""
    inputs = operands[: max(1, len(operands) // 2)]
    shapes = [computation.instruction(name).shape for name in instruction.operands[: len(inputs)]]
    if len(inputs) == 1:
        state = flat(inputs[0])
        removed = following.integers(instruction.attributes.get("dimensions", ""))
        if state.has_feature(removed):  # norms and scores of tokens are not tokens
            state = state._replace(marks=state.marks & ~ON_TOKENS, via=0)
        left = [n for at, n in enumerate(array_dims(shapes[0])) if at not in removed and n > 1]
        if state.marks & EXPERT_GRADIENT and len(left) < 2:  # a norm of gradients is not a gradient
            state = state._replace(marks=state.marks & ~(EXPERT_GRADIENT | GRADIENT), via=0)
        return shaped(
            with_dims(state, lambda dims: following.reduced(dims, instruction)), instruction.shape
        )
    return _compared_together(inputs, shapes)


def _sort(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    shapes = [computation.instruction(name).shape for name in instruction.operands]
    together = _compared_together(operands, shapes)
    return together if len(operands) > 1 else flat(together)


def _compared_together(operands: list[Value], shapes: list[str]) -> Value:
    """Order arrays by some of them: integers become positions, data is routed."""
    states = [flat(each) for each in operands]
    by_numbers = any(
        is_float(shape) and holds_data(state) for shape, state in zip(shapes, states, strict=True)
    )
    by_index = any(state.marks & (INDICES | MASK) for state in states)
    merged = join(states)
    results: list[Value] = []
    for shape, state in zip(shapes, states, strict=True):
        marks = state.marks
        if not is_float(shape) and (by_numbers or by_index):
            marks |= INDICES
        elif is_float(shape) and by_index:
            marks |= ROUTED
        several = len(states) > 1
        origin = None if several and holds_data(merged) else state.origin
        results.append(State(merged.deps, origin, marks, 0 if marks & INDICES else state.via))
    return results


ARITHMETIC_RULES: dict[str, OpcodeRule] = {
    "exponential": _score,
    "logistic": _score,
    "add": _add,
    "subtract": _add,
    "multiply": _multiply,
    "compare": _compare,
    "convert": _convert,
    "bitcast-convert": _reinterpreted,
    "select": _select,
    "reduce": _reduce,
    "sort": _sort,
}
