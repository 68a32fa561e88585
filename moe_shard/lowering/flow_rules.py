"""What each opcode makes of the states of its operands (see `flow`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from moe_shard.lowering import dims as following
from moe_shard.lowering.dims import LIBRARY_PRODUCT, Dims, product_dims
from moe_shard.lowering.flow import (
    COMPARED,
    CONSTANT,
    EXPERT_GRADIENT,
    EXPERT_OUTPUT,
    FEATURE,
    GRADIENT,
    INDEX,
    MASK,
    ON_ROWS,
    ROUTED,
    UPDATED,
    Assumption,
    Evaluation,
    Flow,
    Parameter,
    Rule,
    State,
    Value,
    element,
    flat,
    is_float,
    join,
    shaped,
)
from moe_shard.lowering.hlo import Computation, Instruction, Module
from moe_shard.lowering.shapes import array_dims, tuple_elements
from moe_shard.lowering.walk import ASYNC_CALLS, EXCHANGES, OPCODES

_CONSTANT_TARGETS = re.compile(r'custom_call_target="(?:AllocateBuffer|GetRngState)"')
# These hand on what they are given.
_SAME_TARGETS = re.compile(
    r'custom_call_target="(?:Sharding|SPMD\w+|AsyncCollective\w+|annotate_device_placement'
    r"|LayoutConstraint|MoveTo(?:Host|Device)|Pin|Unpin|ConcatBitcast|BitcastFusion"
    r'|xla\.sdy\.\w+|PadToStatic|SliceToDynamic)"'
)
_TOP_K = re.compile(r'custom_call_target="(?:TopK|__gpu\$TopK|\w*[Tt]op_?[Kk]\w*)"')


def evaluate(
    module: Module,
    assumed: Assumption | None = None,
    shardings: Mapping[int, str] | None = None,
) -> Flow:
    """Evaluate a module (see `flow`).

    Args:
        module: the program.
        assumed: for a program without a router, what counts experts; None asks for routed data.
        shardings: of the ENTRY parameters by position, where the text has none.

    Raises:
        HloParseError: the text is damaged.
    """
    return Evaluation(module, _RULES, _elementwise, assumed, shardings).run()


# What only lays out anew


def _relaid(follow: Callable[[Dims, Computation, Instruction], Dims | None]) -> Rule:
    def rule(
        _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
    ) -> Value:
        state = flat(operands[0])
        return _with_dims(state, lambda dims: follow(dims, computation, instruction))

    return rule


def _with_dims(state: State, follow: Callable[[Dims], Dims | None]) -> State:
    origin, feature = state.origin, state.feature
    if origin is not None and origin.dims is not None:
        state = state._replace(origin=origin._replace(dims=follow(origin.dims)))
    if feature is not None:
        state = state._replace(feature=follow(feature))
    return state


def _reshaped(dims: Dims, computation: Computation, instruction: Instruction) -> Dims | None:
    before = computation.instruction(instruction.operand(0)).shape
    in_memory = instruction.opcode == "bitcast"
    return following.reshaped(dims, before, instruction.shape, in_memory=in_memory)


def _broadcast(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    state = flat(operands[0])
    before = array_dims(computation.instruction(instruction.operand(0)).shape)
    if math.prod(before) == 1 and _is_computed(state):
        # A number for all, such as a norm: what is multiplied by it is still its own.
        return State(state.deps, None, state.marks & (COMPARED | INDEX | MASK), 0)
    return _with_dims(state, lambda dims: following.broadcast(dims, instruction))


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
    """The second half of an asynchronous pair: its start holds (operands, result, ...)."""
    if instruction.opcode == "copy-done":
        return element(operands[0], 0)
    if instruction.opcode in ("all-reduce-done", "async-update", "call-done"):
        return operands[0]
    return element(operands[0], 1)


# Control flow


def _fusion(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    return run.called(instruction, operands, "calls", "to_apply", "called_computations")


def _async_start(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    result = run.called(instruction, operands, "calls", "called_computations", "to_apply")
    # A `call-done` returns what was called; an `async-done` the second of its start.
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
    """What one of several branches gives."""
    first = results[0]
    if isinstance(first, list) and all(
        isinstance(each, list) and len(each) == len(first) for each in results
    ):
        return [_merged([element(each, at) for each in results]) for at in range(len(first))]
    states = [flat(each) for each in results]
    merged = join(states)
    same = all(state.origin == states[0].origin for state in states)
    return merged._replace(origin=states[0].origin if same else None)


# Arithmetic


def _elementwise(
    _run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    return shaped(_combined(operands), instruction.shape)


def _combined(operands: list[Value]) -> State:
    states = [flat(each) for each in operands]
    return join(states) if states else CONSTANT


def _score(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """An exponential or a sigmoid: a router has one of its scores, over all experts."""
    state = _combined(operands)
    if _is_computed(state) and not state.marks & GRADIENT and instruction.shape[0] != "(":
        run.flow.scored.update(array_dims(instruction.shape)[-1:])
    return shaped(state, instruction.shape)


def _is_computed(state: State) -> bool:
    return state.origin is None


def _add(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """A sum of routed data with a residual is routed no more; with a bias it still is."""
    states = [flat(each) for each in operands]
    merged = join(states)
    if not is_float(instruction.shape):
        return merged
    size = math.prod(array_dims(instruction.shape)) if instruction.shape[0] != "(" else 0
    computed = [state for state in states if _is_computed(state) or _is_as_large(run, state, size)]
    if len(computed) == 2 and not all(state.marks & ROUTED for state in computed):
        # Gradients that are added up keep what they came through; a residual does not.
        via = merged.via if merged.marks & (GRADIENT | EXPERT_GRADIENT) else 0
        merged = merged._replace(marks=merged.marks & ~ON_ROWS, via=via)
    elif len(computed) == 1:
        beside = [state for state in states if state.origin is not None and state.origin.params]
        if beside and computed[0].marks & (EXPERT_GRADIENT | GRADIENT):
            merged = merged._replace(marks=merged.marks | UPDATED)
        elif beside and computed[0].marks & EXPERT_OUTPUT:
            run.found_bias(beside[0], size)
    return merged


def _is_as_large(run: Evaluation, state: State, size: int) -> bool:
    """Whether a value is a parameter of as many elements, not one broadcast, as a bias is."""
    if state.origin is None or state.origin.main < 0:
        return False
    parameter = run.flow.parameters[state.origin.main]
    return math.prod(parameter.global_sizes) >= size > 1 and not (
        run.flow.weights >> parameter.position & 1
    )


def _multiply(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """A mask times data routes the data; times a weight for each choice it is a mask still."""
    states = [flat(each) for each in operands]
    merged = join(states)
    if not is_float(instruction.shape):
        return merged
    for mask, data, name in zip(states, states[::-1], instruction.operands, strict=False):
        if mask.marks & MASK and not data.marks & MASK and _holds_data(data):
            marks = merged.marks | ROUTED
            if data.marks & ROUTED or _is_spread(computation, name):
                marks &= ~MASK
            return merged._replace(marks=marks, via=data.via)
    if rows := [state for state in states if state.marks & ROUTED]:
        return merged._replace(via=join(rows).via)  # what weighs them came another way
    return merged


def _is_spread(computation: Computation, name: str) -> bool:
    """Whether a value is broadcast along a dim: what it multiplies has a dim that it has not."""
    for _ in range(4):
        made = computation.instruction(name)
        if made.opcode == "broadcast":
            before = array_dims(computation.instruction(made.operand(0)).shape)
            return math.prod(before) < math.prod(array_dims(made.shape))
        if made.opcode not in ("convert", "bitcast", "reshape", "copy") or not made.operands:
            return False
        name = made.operand(0)
    return False


def _holds_data(state: State) -> bool:
    return state.origin is None or state.origin.params != 0


def _compare(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    merged = _combined(operands)
    marks = merged.marks
    if marks & (INDEX | MASK):
        return merged._replace(marks=MASK, via=0)
    shape = computation.instruction(instruction.operand(0)).shape
    compared = is_float(shape) and _holds_data(merged)
    return merged._replace(marks=COMPARED if compared else marks & COMPARED)


def _convert(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    state = flat(operands[0])
    before = computation.instruction(instruction.operand(0)).shape
    if before.startswith("pred") and state.marks & COMPARED:
        return state._replace(marks=(state.marks & ~COMPARED) | MASK)
    if is_float(instruction.shape) and state.marks & INDEX:
        return state._replace(marks=state.marks | MASK)
    narrow = re.match(r"[su](2|4|8)\[", instruction.shape)  # quantized numbers, no positions
    if is_float(before) and not is_float(instruction.shape) and _is_computed(state) and not narrow:
        return state._replace(marks=state.marks | INDEX, via=0)
    return state


def _reinterpreted(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """The bits of numbers as integers, which a compiler sorts in their place, and back."""
    state = flat(operands[0])
    was_float = is_float(computation.instruction(instruction.operand(0)).shape)
    if was_float and not is_float(instruction.shape) and _is_computed(state):
        return state._replace(marks=state.marks | INDEX, via=0)
    if is_float(instruction.shape) and not was_float:
        return state._replace(marks=state.marks & ~INDEX)
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
        data = any(_holds_data(state) for state in chosen)
        if not is_float(instruction.shape):
            marks |= INDEX
        else:
            marks |= ROUTED if data else MASK
    elif chooser.marks & COMPARED and not is_float(instruction.shape):
        marks |= COMPARED if instruction.shape.startswith("pred") else INDEX
    return merged._replace(marks=marks)


def _reduce(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """Also of pairs: an argmax reduces scores and their positions together."""
    inputs = operands[: max(1, len(operands) // 2)]
    shapes = [computation.instruction(name).shape for name in instruction.operands[: len(inputs)]]
    if len(inputs) == 1:
        state = flat(inputs[0])
        removed = following.integers(instruction.attributes.get("dimensions", ""))
        if state.has_feature(removed):  # norms and scores of rows are no rows
            state = state._replace(marks=state.marks & ~ON_ROWS, via=0)
        return shaped(
            _with_dims(state, lambda dims: following.reduced(dims, instruction)), instruction.shape
        )
    return _compared_together(inputs, shapes)


def _sort(
    _run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    shapes = [computation.instruction(name).shape for name in instruction.operands]
    together = _compared_together(operands, shapes)
    return together if len(operands) > 1 else flat(together)


def _compared_together(operands: list[Value], shapes: list[str]) -> Value:
    """Arrays put into an order by some of them: integers become positions, data is routed."""
    states = [flat(each) for each in operands]
    by_numbers = any(
        is_float(shape) and _holds_data(state) for shape, state in zip(shapes, states, strict=True)
    )
    by_index = any(state.marks & (INDEX | MASK) for state in states)
    merged = join(states)
    results: list[Value] = []
    for shape, state in zip(shapes, states, strict=True):
        marks = state.marks
        if not is_float(shape) and (by_numbers or by_index):
            marks |= INDEX
        elif is_float(shape) and by_index:
            marks |= ROUTED
        several = len(states) > 1
        origin = None if several and _holds_data(merged) else state.origin
        results.append(State(merged.deps, origin, marks, 0 if marks & INDEX else state.via))
    return results


# What indices select


def _selected(run: Evaluation, data: State, index: State, shape: str) -> State:
    """Data at places that an index tells."""
    state = data._replace(deps=data.deps | index.deps)
    if index.marks & (INDEX | MASK):
        if not is_float(shape):
            return state._replace(origin=None, marks=data.marks | INDEX)
        _sees_itself(run, data, index)
        return state._replace(origin=None, marks=data.marks | ROUTED)
    if _holds_data(index):
        if data.origin is not None and data.origin.main >= 0 and is_float(shape):
            run.flow.weights |= 1 << data.origin.main  # an embedding, looked up by tokens
        return state._replace(origin=None)
    return state


def _sees_itself(run: Evaluation, data: State, index: State) -> None:
    """A parameter that decides which part of itself is taken is data: tokens before a router."""
    if data.origin is not None and data.origin.main >= 0:
        bit = 1 << data.origin.main
        if index.deps & bit and data.origin.main not in run.flow.experts:
            run.flow.data |= bit


def _gather(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    data, index = flat(operands[0]), flat(operands[1])
    # Which dims are left of the data is another for every gather.
    return _with_dims(_selected(run, data, index, instruction.shape), lambda _dims: None)


def _dynamic_slice(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    data = flat(operands[0])
    index = _combined(operands[1:]) if len(operands) > 1 else CONSTANT
    return _selected(run, data, index, instruction.shape)


def _update_slice(
    run: Evaluation, _computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    buffer, update = flat(operands[0]), flat(operands[1])
    index = _combined(operands[2:]) if len(operands) > 2 else CONSTANT
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
        both = _with_dims(join([update, target]), lambda _dims: None)
        state = _selected(run, both, index, shapes[min(at, len(shapes) - 1)])
        if _is_computed(update) and not state.marks & ROUTED:
            state = state._replace(marks=state.marks | GRADIENT)  # of an embedding
        results.append(state)
    return results if instruction.shape.startswith("(") else results[0]


# Products


def _product(
    run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    """A dot, a convolution, or a library's product of operands 0 and 1."""
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
        return _mapped(sides[side], (0,)) if side == 1 else ()

    return _multiplied(run, computation, instruction, sides, experts)


def _multiplied(
    run: Evaluation,
    computation: Computation,
    instruction: Instruction,
    sides: tuple[State, State],
    experts: Callable[[int], tuple[int, ...]],
) -> State:
    """The state of a product.

    Args:
        run: the evaluation.
        computation: where the product stands.
        instruction: the product.
        sides: its operands.
        experts: the dims of the parameter in operand 0 or 1 that count experts, if this is a
            product in which they can; else ().
    """
    flow = run.flow
    deps = sides[0].deps | sides[1].deps
    for side in (0, 1):
        weights, rows = sides[side], sides[1 - side]
        if _takes_rows(run, weights, rows):
            assert weights.origin is not None
            if dims := tuple(flow.experts.get(weights.origin.main, ())) or experts(side):
                run.found_experts((computation.name, instruction.name), weights, dims, rows)
                feature = following.given_by(computation, instruction, side)
                return State(deps, None, ROUTED | EXPERT_OUTPUT, rows.via, feature)
    computed = all(_is_computed(state) for state in sides)
    if computed and run.is_expert_gradient(*sides, instruction.shape):
        flow.gradients.add((computation.name, instruction.name))
        return State(deps, None, EXPERT_GRADIENT, 0)
    for side in (0, 1):
        mask, data = sides[side], sides[1 - side]
        if mask.marks & MASK and not mask.marks & EXPERT_OUTPUT:
            if data.marks & MASK and not data.marks & EXPERT_OUTPUT:
                return State(deps, None, MASK | (mask.marks | data.marks) & ROUTED, 0)
            _sees_itself(run, data, mask)
            return State(deps, None, ROUTED | (data.marks & EXPERT_OUTPUT), data.via)
    first, second = sides
    if first.origin is not None and second.origin is not None:
        return _of_parameters(run, deps, first, second)
    if first.origin is not None or second.origin is not None:
        weights, rows = (first, second) if first.origin is not None else (second, first)
        assert weights.origin is not None
        position = weights.origin.main
        if position < 0:
            return rows._replace(deps=deps)
        if not rows.deps >> position & 1:
            flow.weights |= 1 << position
        if flow.data >> position & 1 or (rows.marks & ROUTED and not flow.weights >> position & 1):
            return State(deps, None, rows.marks & ON_ROWS | GRADIENT, 0)
        return State(deps, None, 0, 0)
    marks = first.marks | second.marks
    # Of a program without a router, what attention makes of rows is not theirs any more.
    kept = 0 if flow.assumed or _gives_scores(computation, instruction, sides) else marks
    return State(deps, None, kept & ON_ROWS | GRADIENT, 0)


def _gives_scores(
    computation: Computation, instruction: Instruction, sides: tuple[State, State]
) -> bool:
    """Whether a product sums over the vectors of experts' outputs: it gives scores, and no rows."""
    if instruction.opcode == "ragged-dot":
        return False
    return any(
        state.has_feature(product_dims(computation, instruction, side).contracted)
        for side, state in enumerate(sides)
    )


def _takes_rows(run: Evaluation, weights: State, rows: State) -> bool:
    """Whether a product's operands can be a parameter and the data that experts work on.

    The data must not depend on the parameter (unless that is known to be experts'): tokens do
    depend on themselves where a router's mask selects them, weights do not where they are first
    used.
    """
    origin = weights.origin
    if origin is None or origin.main < 0 or not run.are_rows(rows):
        return False
    if run.flow.data >> origin.main & 1:
        return False
    return origin.main in run.flow.experts or not rows.deps >> origin.main & 1


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


def _mapped(state: State, places: tuple[int, ...]) -> tuple[int, ...]:
    """The parameter's dims at these places of a value."""
    if state.origin is None or state.origin.dims is None:
        return places
    dims = state.origin.dims
    return tuple(sorted({dim for at in places if at < len(dims) for dim in dims[at]}))


def _expert_dims(
    run: Evaluation, computation: Computation, instruction: Instruction, state: State, side: int
) -> tuple[int, ...]:
    """The dims of a parameter that count experts in a product with routed data; () for none.

    Those are its batch dims; a dim that is split over devices and of which one element takes part
    (a device with one expert, or a loop over experts); and the first of several contracted dims,
    where a compiler without grouped products masks the tokens for each expert.
    """
    assert state.origin is not None
    parameter = run.flow.parameters[state.origin.main]
    if len([size for size in parameter.global_sizes if size > 1 or not parameter.is_told]) < 3:
        return ()  # a matrix, and no stack of them
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
        return _mapped(state, batch) or (0,)
    if state.origin.dims is not None and (parameter.split or not parameter.is_told):
        present = {
            dim for at, held in enumerate(state.origin.dims) if shape[at] > 1 for dim in held
        }
        # Where the text does not say how it is split, a dim of one element may be a part of one.
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
        return _mapped(state, contracted[:1])
    held = state.origin.dims
    merged = [held[at] for at in contracted if len(held[at]) > 1] if held is not None else []
    return merged[0][:1] if merged else ()


def _custom_call(
    run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    text = instruction.attribute_text
    if _CONSTANT_TARGETS.search(text):
        return shaped(CONSTANT, instruction.shape)
    if _SAME_TARGETS.search(text):
        if len(operands) == 1:
            return operands[0]
        return shaped(_combined(operands), instruction.shape)
    if LIBRARY_PRODUCT.search(text):
        return _product(run, computation, instruction, operands)
    if _TOP_K.search(text):
        state = flat(operands[0])
        return [state, state._replace(origin=None, marks=state.marks | INDEX)]
    return shaped(_kernel(run, computation, instruction, operands), instruction.shape)


def _kernel(
    run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> State:
    """A kernel whose arithmetic is not in the text: a grouped product, or anything else.

    One that takes routed data and a parameter with a dim of experts before a matrix is a product of
    experts; one that takes routed data twice and integers that tell its groups, and makes a stack
    of matrices, makes the gradient of such a parameter.
    """
    states = [flat(each) for each in operands]
    merged = join(states) if states else CONSTANT
    shapes = [computation.instruction(name).shape for name in instruction.operands]
    numbers = [
        (state, shape)
        for state, shape in zip(states, shapes, strict=True)
        if is_float(shape) and not shape.startswith("(")
    ]
    rows = [state for state, _ in numbers if state.origin is None and run.are_rows(state)]
    groups = any(state.marks & INDEX for state in states)
    for state, shape in numbers:
        if not rows or not _takes_rows(run, state, rows[0]):
            continue
        assert state.origin is not None
        dims = tuple(run.flow.experts.get(state.origin.main, ()))
        split = run.flow.parameters[state.origin.main].split
        if not dims and (len(array_dims(shape)) < 3 or not (groups or split)):
            continue
        dims = dims or _mapped(state, (0,)) or (0,)
        run.found_experts((computation.name, instruction.name), state, dims, join(rows))
        rank = len(array_dims(tuple_elements(instruction.shape)[0]))
        feature = (*((),) * (rank - 1), (FEATURE,))
        return State(merged.deps, None, ROUTED | EXPERT_OUTPUT, join(rows).via, feature)
    result = tuple_elements(instruction.shape)[0]
    if groups and len(rows) > 1 and len(array_dims(result)) > 2 and is_float(result):
        run.flow.gradients.add((computation.name, instruction.name))
        return State(merged.deps, None, EXPERT_GRADIENT, 0)
    for state, _ in numbers:
        if state.origin is not None and state.origin.main >= 0:
            run.flow.opaque |= state.origin.params
    origin = merged.origin if merged.origin is not None and not merged.origin.params else None
    return State(merged.deps, origin, merged.marks, merged.via)


# Collectives


def _collective(
    run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    kind = OPCODES[instruction.opcode]
    site = (computation.name, instruction.name)
    states = [flat(each) for each in operands]
    if kind == "ragged-all-to-all":
        states = states[:1]  # the others are its buffer, and where the rows go
    run.flow.sites[site] = states
    bit = run.flow.bit(site)
    if kind in EXCHANGES:
        run.flow.exchanges |= bit
    results: list[State] = []
    for state in states if kind != "all-to-all" else [join(states)] * len(states):
        marks = state.marks
        if kind == "ragged-all-to-all":
            marks |= ROUTED
        results.append(state._replace(marks=marks, via=state.via | bit))
        _note_gather(run, site, kind, instruction, state)
    shape = instruction.shape
    is_start = instruction.opcode.endswith("-start") and kind != "all-reduce"
    value: Value
    if is_start:
        result = tuple_elements(shape)[1] if shape.startswith("(") else shape
        value = list(results) if result.startswith("(") else results[0]
        return [list(operands), value, CONSTANT]
    if shape.startswith("("):
        count = len(tuple_elements(shape))
        return [results[min(at, len(results) - 1)] for at in range(count)]
    return results[0] if results else CONSTANT


def _note_gather(
    run: Evaluation, site: tuple[str, str], kind: str, instruction: Instruction, state: State
) -> None:
    """Take down along which of a parameter's dims it is gathered: there it is split."""
    if kind == "all-gather" and state.origin is not None and state.origin.dims is not None:
        places = following.integers(instruction.attributes.get("dimensions", ""))
        run.flow.gathered[site] = {
            (state.origin.main, dim) for dim in _mapped(state, tuple(places))
        }


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

_RULES: dict[str, Rule] = {
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
    "gather": _gather,
    "dynamic-slice": _dynamic_slice,
    "dynamic-update-slice": _update_slice,
    "scatter": _scatter,
    "dot": _product,
    "convolution": _product,
    "ragged-dot": _ragged_dot,
    "custom-call": _custom_call,
    **dict.fromkeys(OPCODES, _collective),
}
