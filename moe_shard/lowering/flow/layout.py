"""Evaluate opcodes that change the layout, pass a value on, or call a computation."""

from __future__ import annotations

import math
from collections.abc import Callable

from moe_shard.lowering import dims as following
from moe_shard.lowering.dims import Dims
from moe_shard.lowering.flow.evaluation import Evaluation, OpcodeRule
from moe_shard.lowering.flow.states import (
    COMPARED,
    CONSTANT,
    INDICES,
    MASK,
    State,
    Value,
    element,
    flat,
    is_computed,
    join,
    shaped,
    with_dims,
)
from moe_shard.lowering.hlo import Computation, Instruction
from moe_shard.lowering.shapes import array_dims
from moe_shard.lowering.walk import ASYNC_CALLS


def _relaid(follow: Callable[[Dims, Computation, Instruction], Dims | None]) -> OpcodeRule:
    def rule(
        _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
    ) -> Value:
        state = flat(operands[0])
        return with_dims(state, lambda dims: follow(dims, computation, instruction))

    return rule


def _reshaped(dims: Dims, computation: Computation, instruction: Instruction) -> Dims | None:
    before = computation.instruction(instruction.operand(0)).shape
    in_memory = instruction.opcode == "bitcast"
    return following.reshaped(dims, before, instruction.shape, in_memory=in_memory)


def _broadcast(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    state = flat(operands[0])
    before = array_dims(computation.instruction(instruction.operand(0)).shape)
    if math.prod(before) == 1 and is_computed(state):
        # One number for all elements, such as a norm, adds nothing to what it is multiplied with.
        return State(state.deps, None, state.marks & (COMPARED | INDICES | MASK), 0)
    return with_dims(state, lambda dims: following.broadcast(dims, instruction))


def _first(
    _run: Evaluation, _computation: Computation, _instruction: Instruction, operands: list[Value]
) -> Value:
    return operands[0] if operands else CONSTANT


def _constant(
    _run: Evaluation, _computation: Computation, instruction: Instruction, _operands: list[Value]
) -> Value:
    return shaped(CONSTANT, instruction.shape)


def _tuple(
    _run: Evaluation, _computation: Computation, _instruction: Instruction, operands: list[Value]
) -> Value:
    return list(operands)


def _element(
    _run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    return element(operands[0], instruction.integer("index") or 0)


def _started_copy(
    _run: Evaluation, _computation: Computation, _instruction: Instruction, operands: list[Value]
) -> Value:
    return [operands[0], operands[0], CONSTANT]


def _done(
    _run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """Return the result of an asynchronous pair; its start holds (operands, result, ...)."""
    if instruction.opcode == "copy-done":
        return element(operands[0], 0)
    if instruction.opcode in ("all-reduce-done", "async-update", "call-done"):
        return operands[0]
    return element(operands[0], 1)


def _fusion(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    return run.called(instruction, operands, "calls", "to_apply", "called_computations")


def _async_start(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    result = run.called(instruction, operands, "calls", "called_computations", "to_apply")
    # A `call-done` returns the result of the call; an `async-done` the second element of its start.
    return result if instruction.opcode == "call-start" else [list(operands), result, CONSTANT]


def _while(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    return run.loop(instruction, operands[0] if operands else [])


def _conditional(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    branches = instruction.branches()
    results = [
        run.computation(run.module.computations[name], [argument])
        for name, argument in zip(branches, operands[1:], strict=False)
        if name in run.module.computations
    ]
    return _merged(results) if results else shaped(CONSTANT, instruction.shape)


def _merged(results: list[Value]) -> Value:
    """Merge the results of several branches."""
    first = results[0]
    if isinstance(first, list) and all(
        isinstance(each, list) and len(each) == len(first) for each in results
    ):
        return [_merged([element(each, at) for each in results]) for at in range(len(first))]
    states = [flat(each) for each in results]
    merged = join(states)
    same = all(state.origin == states[0].origin for state in states)
    return merged._replace(origin=states[0].origin if same else None)


_SAME = (
    *("copy", "slice", "reverse", "reduce-precision", "negate", "opt-barrier"),
    *("domain", "pad", "get-dimension-size", "add-dependency"),
)
_CONSTANTS = (
    *("iota", "partition-id", "replica-id", "after-all", "rng", "rng-bit-generator"),
    *("infeed", "rng-get-and-update-state", "create-token"),
)
_DONE = (
    *("copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done"),
    *("async-done", "async-update", "call-done", "ragged-all-to-all-done"),
)


LAYOUT_RULES: dict[str, OpcodeRule] = {
    **dict.fromkeys(_SAME, _first),
    **dict.fromkeys(_CONSTANTS, _constant),
    "bitcast": _relaid(_reshaped),
    "reshape": _relaid(_reshaped),
    "transpose": _relaid(lambda dims, _, instruction: following.transposed(dims, instruction)),
    "broadcast": _broadcast,
    "tuple": _tuple,
    "get-tuple-element": _element,
    "copy-start": _started_copy,
    **dict.fromkeys(_DONE, _done),
    "fusion": _fusion,
    "call": _fusion,
    **dict.fromkeys(ASYNC_CALLS, _async_start),
    "while": _while,
    "conditional": _conditional,
}
