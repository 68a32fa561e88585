"""Evaluate products: here experts' weights and their gradients are recognized."""

from __future__ import annotations

from collections.abc import Callable

from moe_shard.lowering import dims as following
from moe_shard.lowering.dims import product_dims
from moe_shard.lowering.flow.evaluation import Evaluation, OpcodeRule, Parameter
from moe_shard.lowering.flow.indexing import record_self_selection
from moe_shard.lowering.flow.states import (
    EXPERT_GRADIENT,
    EXPERT_OUTPUT,
    GRADIENT,
    MASK,
    ON_TOKENS,
    ROUTED,
    State,
    Value,
    flat,
    is_computed,
    shaped,
)
from moe_shard.lowering.hlo import Computation, Instruction
from moe_shard.lowering.shapes import array_dims


def dense_product(
    run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """Evaluate a dot, a convolution, or a library's product of operands 0 and 1."""
    sides = flat(operands[0]), flat(operands[1])

    def experts(side: int) -> tuple[int, ...]:
        return _expert_dims(run, computation, instruction, sides[side], side)

    state = _multiplied(run, computation, instruction, sides, experts)
    return shaped(state, instruction.shape)


def _ragged_dot(
    run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    sides = flat(operands[0]), flat(operands[1])

    def experts(side: int) -> tuple[int, ...]:
        return mapped(sides[side], (0,)) if side == 1 else ()

    return _multiplied(run, computation, instruction, sides, experts)


def _multiplied(
    run: Evaluation,
    computation: Computation,
    instruction: Instruction,
    sides: tuple[State, State],
    experts: Callable[[int], tuple[int, ...]],
) -> State:
    """Return the state of a product.

    Args:
        run: the evaluation.
        computation: the computation that the product is in.
        instruction: the product.
        sides: its operands.
        experts: returns the dims of the parameter in operand 0 or 1 that count experts; () where
            none can in this product.
    """
    flow = run.flow
    deps = sides[0].deps | sides[1].deps
    for side in (0, 1):
        weights, tokens = sides[side], sides[1 - side]
        if takes_tokens(run, weights, tokens):
            assert weights.origin is not None
            if dims := tuple(flow.experts.get(weights.origin.main, ())) or experts(side):
                run.found_experts((computation.name, instruction.name), weights, dims, tokens)
                feature = following.free_dims(computation, instruction, side)
                return State(deps, None, ROUTED | EXPERT_OUTPUT, tokens.via, feature)
    computed = all(is_computed(state) for state in sides)
    if computed and run.is_expert_gradient(*sides, instruction.shape):
        flow.gradients.add((computation.name, instruction.name))
        return State(deps, None, EXPERT_GRADIENT, 0)
    for side in (0, 1):
        mask, data = sides[side], sides[1 - side]
        if mask.marks & MASK and not mask.marks & EXPERT_OUTPUT:
            if data.marks & MASK and not data.marks & EXPERT_OUTPUT:
                return State(deps, None, MASK | (mask.marks | data.marks) & ROUTED, 0)
            record_self_selection(run, data, mask)
            return State(deps, None, ROUTED | (data.marks & EXPERT_OUTPUT), data.via)
    first, second = sides
    if first.origin is not None and second.origin is not None:
        return _of_parameters(run, deps, first, second)
    if first.origin is not None or second.origin is not None:
        weights, tokens = (first, second) if first.origin is not None else (second, first)
        assert weights.origin is not None
        position = weights.origin.main
        if position < 0:
            return tokens._replace(deps=deps)
        if not tokens.deps >> position & 1:
            flow.weights |= 1 << position
        if flow.data >> position & 1 or (
            tokens.marks & ROUTED and not flow.weights >> position & 1
        ):
            return State(deps, None, tokens.marks & ON_TOKENS | GRADIENT, 0)
        return State(deps, None, 0, 0)
    marks = first.marks | second.marks
    # In a program without a router, the output of attention no longer counts as routed.
    kept = 0 if flow.assumed or _gives_scores(computation, instruction, sides) else marks
    return State(deps, None, kept & ON_TOKENS | GRADIENT, 0)


def _gives_scores(
    computation: Computation, instruction: Instruction, sides: tuple[State, State]
) -> bool:
    """Return whether a product sums over the feature dim of expert outputs: it returns scores."""
    if instruction.opcode == "ragged-dot":
        return False
    return any(
        state.has_feature(product_dims(computation, instruction, side).contracted)
        for side, state in enumerate(sides)
    )


def takes_tokens(run: Evaluation, weights: State, tokens: State) -> bool:
    """Return whether a product's operands can be a parameter and experts' input.

    Experts' input is routed, or a routed index has chosen the weights for it. It must not depend on
    the parameter, unless that is known to be an expert weight: tokens selected by a router's mask
    depend on themselves, weights do not where they are first used.
    """
    origin = weights.origin
    if origin is None or origin.main < 0:
        return False
    if not run.are_tokens(tokens) and not weights.marks & ROUTED:
        return False
    if run.flow.data >> origin.main & 1:
        return False
    return origin.main in run.flow.experts or not tokens.deps >> origin.main & 1


def _of_parameters(run: Evaluation, deps: int, first: State, second: State) -> State:
    assert first.origin is not None
    assert second.origin is not None
    one, other = first.origin.main, second.origin.main
    if one < 0 or other < 0:
        kept = second if one < 0 else first
        origin = kept.origin
        if origin is not None:
            origin = origin._replace(dims=None)
        return State(deps, origin, 0, kept.via)
    run.flow.met.setdefault(one, set()).add(other)
    run.flow.met.setdefault(other, set()).add(one)
    return State(deps, None, 0, 0)


def mapped(state: State, places: tuple[int, ...]) -> tuple[int, ...]:
    """Return the parameter's dims at these positions of a value."""
    if state.origin is None or state.origin.dims is None:
        return places
    dims = state.origin.dims
    return tuple(sorted({dim for at in places if at < len(dims) for dim in dims[at]}))


def _expert_dims(
    run: Evaluation, computation: Computation, instruction: Instruction, state: State, side: int
) -> tuple[int, ...]:
    """Return the dims of a parameter that count experts in a product with routed data.

    These are its batch dims; a dim that is split over devices and of which one element is used (a
    device with one expert, or a loop over experts); and the first of several contracted dims, where
    a compiler without grouped products masks the tokens for each expert. () for none.
    """
    assert state.origin is not None
    parameter = run.flow.parameters[state.origin.main]
    if (
        len([size for size in parameter.global_sizes if size > 1 or not parameter.sharding_known])
        < 3
    ):
        return ()  # a matrix, not a stack of matrices
    return run.may_count_experts(
        parameter, _candidates(computation, instruction, state, side, parameter)
    )


def _candidates(
    computation: Computation,
    instruction: Instruction,
    state: State,
    side: int,
    parameter: Parameter,
) -> tuple[int, ...]:
    assert state.origin is not None
    parts = product_dims(computation, instruction, side)
    shape = array_dims(computation.instruction(instruction.operand(side)).shape)
    batch = tuple(at for at in parts.batch if shape[at] > 1)
    if batch:
        return mapped(state, batch) or (0,)
    if state.origin.dims is not None and (parameter.split or not parameter.sharding_known):
        present = {
            dim for at, held in enumerate(state.origin.dims) if shape[at] > 1 for dim in held
        }
        # Where its split is unknown, a dim of size 1 may be a part of a larger one.
        guessed = tuple(2 if size == 1 else 1 for size in parameter.sizes)
        parts_of = parameter.split.parts if parameter.split else guessed
        single = tuple(
            dim
            for dim, count in enumerate(parts_of)
            if count > 1 and dim not in present and dim < len(parts_of) - 2
        )
        if single:
            return single
    contracted = tuple(at for at in parts.contracted if shape[at] > 1)
    if len(contracted) > 1 and len(shape) > 2:
        return mapped(state, contracted[:1])
    held = state.origin.dims
    merged = [held[at] for at in contracted if len(held[at]) > 1] if held is not None else []
    return merged[0][:1] if merged else ()


PRODUCT_RULES: dict[str, OpcodeRule] = {
    "dot": dense_product,
    "convolution": dense_product,
    "ragged-dot": _ragged_dot,
}
