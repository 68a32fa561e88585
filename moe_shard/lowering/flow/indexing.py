"""Evaluate opcodes that read or write at the positions of an index."""

from __future__ import annotations

from moe_shard.lowering.dims import gathered
from moe_shard.lowering.flow.evaluation import Evaluation, OpcodeRule
from moe_shard.lowering.flow.states import (
    CONSTANT,
    GRADIENT,
    INDICES,
    MASK,
    ROUTED,
    State,
    Value,
    flat,
    holds_data,
    is_computed,
    is_float,
    join,
    join_operands,
    with_dims,
)
from moe_shard.lowering.hlo import Computation, Instruction
from moe_shard.lowering.shapes import tuple_elements


def _selected(run: Evaluation, data: State, index: State, shape: str) -> State:
    """Return the state of data at the positions of an index."""
    state = data._replace(deps=data.deps | index.deps)
    if index.marks & (INDICES | MASK):
        if not is_float(shape):
            return state._replace(origin=None, marks=data.marks | INDICES)
        record_self_selection(run, data, index)
        return state._replace(origin=None, marks=data.marks | ROUTED)
    if holds_data(index):
        if data.origin is not None and data.origin.main >= 0 and is_float(shape):
            run.flow.weights |= 1 << data.origin.main  # an embedding, looked up by tokens
        return state._replace(origin=None)
    return state


def record_self_selection(run: Evaluation, data: State, index: State) -> None:
    """Record a parameter that decides which part of itself is selected: it is data.

    Tokens before a router do, weights do not.
    """
    if data.origin is not None and data.origin.main >= 0:
        bit = 1 << data.origin.main
        if index.deps & bit and data.origin.main not in run.flow.experts:
            run.flow.data |= bit


def _gather(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    data, index = flat(operands[0]), flat(operands[1])
    if _chooses_experts(run, data, index):
        chosen = _of_chosen_experts(data, index)
        return with_dims(chosen, lambda dims: gathered(dims, instruction))
    return with_dims(_selected(run, data, index, instruction.shape), lambda _dims: None)


def _dynamic_slice(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    data = flat(operands[0])
    index = join_operands(operands[1:]) if len(operands) > 1 else CONSTANT
    if _chooses_experts(run, data, index):
        return _of_chosen_experts(data, index)
    return _selected(run, data, index, instruction.shape)


def _of_chosen_experts(data: State, index: State) -> State:
    """Return the state of experts' weights that a routed index has chosen."""
    return data._replace(deps=data.deps | index.deps, marks=data.marks | ROUTED)


def _chooses_experts(run: Evaluation, data: State, index: State) -> bool:
    """Return whether a routed index chooses among the matrices of a stack, which are experts'.

    A loop over blocks of token copies does, each block being of one expert, and a gather of
    weights for every token. What is chosen is still weights; tokens that a routed index chooses
    have decided upon that index themselves.
    """
    if data.origin is None or data.origin.main < 0 or not index.marks & (INDICES | MASK):
        return False
    parameter = run.flow.parameters[data.origin.main]
    stacked = sum(size > 1 or not parameter.sharding_known for size in parameter.global_sizes)
    if parameter.is_data or stacked < 3:
        return False
    known = data.origin.main in run.flow.experts
    return known or not index.deps >> data.origin.main & 1


def _update_slice(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    buffer, update = flat(operands[0]), flat(operands[1])
    index = join_operands(operands[2:]) if len(operands) > 2 else CONSTANT
    return _selected(run, join([update, buffer]), index, instruction.shape)


def _scatter(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    count = max(1, (len(operands) - 1) // 2)
    index = flat(operands[count])
    results: list[Value] = []
    shapes = tuple_elements(instruction.shape)
    for at in range(count):
        target, update = flat(operands[at]), flat(operands[min(count + 1 + at, len(operands) - 1)])
        both = with_dims(join([update, target]), lambda _dims: None)
        state = _selected(run, both, index, shapes[min(at, len(shapes) - 1)])
        if is_computed(update) and not state.marks & ROUTED:
            state = state._replace(marks=state.marks | GRADIENT)  # the gradient of an embedding
        results.append(state)
    return results if instruction.shape.startswith("(") else results[0]


INDEXING_RULES: dict[str, OpcodeRule] = {
    "gather": _gather,
    "dynamic-slice": _dynamic_slice,
    "dynamic-update-slice": _update_slice,
    "scatter": _scatter,
}
