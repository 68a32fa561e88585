"""Define what is known of a value (see the package), and how states are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from moe_shard.lowering.dims import Dims
from moe_shard.lowering.shapes import tuple_elements

INDICES = 1 << 0
"""Integers chosen by a comparison of computed numbers: experts, positions, counts."""
MASK = 1 << 1
"""Made by comparing such integers: a one-hot mask, also when multiplied by combine weights."""
COMPARED = 1 << 2
"""The result of comparing computed numbers."""
ROUTED = 1 << 3
"""Data that `INDICES` or `MASK` selected, and expert outputs."""
EXPERT_OUTPUT = 1 << 4
"""Has passed through a product of experts."""
EXPERT_GRADIENT = 1 << 5
"""The gradient of experts' weights: a product of routed data with routed data."""
GRADIENT = 1 << 6
"""A product of two computed values, not routed: another weight's gradient, or scores."""
UPDATED = 1 << 7
"""A parameter joined with its gradient."""

FEATURE = -1
"""In `State.feature`: a feature dim of expert outputs."""

ON_TOKENS = ROUTED | EXPERT_OUTPUT
"""Marks that are lost in a sum with other data (a residual)."""


class Origin(NamedTuple):
    """Describe a value that is made of ENTRY parameters alone, without a product.

    Attributes:
        params: the parameters' positions as bits; 0 for a constant.
        main: the position of the largest; -1 for a constant.
        dims: the parameter's dims in each dim of the value; None where unknown.
    """

    params: int
    main: int
    dims: Dims | None


class State(NamedTuple):
    """Hold what is known of an array.

    Attributes:
        deps: ENTRY parameters that it depends on, as bits.
        origin: the parameters that it is made of, if of nothing else; None for computed values.
        marks: the marks above.
        via: collectives that it came through since it was a parameter or was routed, as bits.
        feature: for expert outputs, `FEATURE` in each feature dim and nothing in the others; None
            where unknown.
    """

    deps: int
    origin: Origin | None
    marks: int
    via: int
    feature: Dims | None = None

    def has_feature(self, places: Iterable[int]) -> bool:
        """Return whether any of these dims is a feature dim of expert outputs."""
        dims = self.feature or ()
        return any(at < len(dims) and FEATURE in dims[at] for at in places)


Value = State | list["Value"]
"""The state of an array, or of each element of a tuple."""

CONSTANT = State(0, Origin(0, -1, None), 0, 0)


def is_float(shape: str) -> bool:
    """Return whether an array holds floating point or complex numbers."""
    return shape.startswith(("f", "bf", "c")) or shape.startswith(("(f", "(bf"))


def join(states: Sequence[State]) -> State:
    """Join the states of values that are put together: of parameters alone if all are."""
    if len(states) == 1:
        return states[0]
    deps = marks = via = params = 0
    origin: Origin | None = Origin(0, -1, None)
    feature: Dims | None = None
    for state in states:
        deps |= state.deps
        feature = feature or state.feature
        marks |= state.marks
        via |= state.via
        if origin is None or state.origin is None:
            origin = None
        else:
            params = origin.params | state.origin.params
            chosen = origin if origin.main >= 0 else state.origin
            origin = Origin(params, chosen.main, chosen.dims)
    return State(deps, origin, marks, via, feature)


def leaves(value: Value) -> list[State]:
    """Return all arrays of a value."""
    if isinstance(value, State):
        return [value]
    return [leaf for element in value for leaf in leaves(element)]


def flat(value: Value) -> State:
    """Return a value as the state of one array."""
    found = leaves(value)
    return join(found) if found else CONSTANT


def shaped(state: State, shape: str) -> Value:
    """Repeat a state for every array of a shape."""
    if not shape.startswith("("):
        return state
    return [shaped(state, element) for element in tuple_elements(shape)]


def element(value: Value, index: int) -> Value:
    """Return an element of a tuple; of what is not known as a tuple, all of it."""
    if isinstance(value, list):
        return value[index] if index < len(value) else CONSTANT
    return value


def carried(before: Value, after: Value) -> Value:
    """Return what a loop carries into every iteration, given its start and one iteration.

    It is a parameter only if it stays one. Marks are those of the first iteration, unless the
    initial value is a constant.
    """
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [carried(one, other) for one, other in zip(before, after, strict=True)]
    one, other = flat(before), flat(after)
    if one.origin is not None and one.origin.main < 0 and one.origin.params == 0:
        return other
    if one.origin is None or one.origin == other.origin:
        return one
    if other.origin is not None and other.origin.params | one.origin.params == one.origin.params:
        return one._replace(via=one.via | other.via)
    return one._replace(deps=one.deps | other.deps, origin=None)


def after_loop(first: Value, later: Value) -> Value:
    """Return the result of a loop: a parameter only if every iteration returns one."""
    if isinstance(first, list) and isinstance(later, list) and len(first) == len(later):
        return [after_loop(one, other) for one, other in zip(first, later, strict=True)]
    one, other = flat(first), flat(later)
    return State(
        one.deps | other.deps,
        one.origin if one.origin == other.origin else None,
        one.marks | other.marks,
        one.via | other.via,
        one.feature,
    )


def join_operands(operands: list[Value]) -> State:
    """Join the operands of an instruction."""
    states = [flat(each) for each in operands]
    return join(states) if states else CONSTANT


def is_computed(state: State) -> bool:
    """Return whether a value is more than parameters in another layout."""
    return state.origin is None


def holds_data(state: State) -> bool:
    """Return whether a value is not a constant."""
    return state.origin is None or state.origin.params != 0


def with_dims(state: State, follow: Callable[[Dims], Dims | None]) -> State:
    """Follow the dims of a value through a change of layout."""
    origin, feature = state.origin, state.feature
    if origin is not None and origin.dims is not None:
        state = state._replace(origin=origin._replace(dims=follow(origin.dims)))
    if feature is not None:
        state = state._replace(feature=follow(feature))
    return state
