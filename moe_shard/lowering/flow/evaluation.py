"""Evaluate a module over abstract states, and record what is found on the way."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moe_shard.errors import UserError
from moe_shard.lowering.dims import whole
from moe_shard.lowering.flow.states import (
    CONSTANT,
    EXPERT_OUTPUT,
    ROUTED,
    Origin,
    State,
    Value,
    after_loop,
    carried,
    is_float,
    leaves,
    shaped,
)
from moe_shard.lowering.hlo import Computation, Instruction, Module
from moe_shard.lowering.shapes import array_dims, shape_bytes, tuple_elements
from moe_shard.lowering.shardings import Split, parse_split


@dataclass(frozen=True)
class Parameter:
    """Describe an ENTRY parameter.

    Attributes:
        position: its position among the arguments.
        path: its path in the source, `state.params['layers']['wo']`; "" where unknown.
        shape: shape of one device's shard, as HLO writes it.
        sizes: its dims.
        bytes: bytes of one device's shard.
        is_data: whether it holds integers: tokens, counters or keys, never weights.
        split: how it is split over devices; None where it is not, or where that is unknown.
        sharding_known: whether the text states its sharding.
    """

    position: int
    path: str
    shape: str
    sizes: tuple[int, ...]
    bytes: int
    is_data: bool
    split: Split | None
    sharding_known: bool = True

    @property
    def global_sizes(self) -> tuple[int, ...]:
        """Return its dims over all devices."""
        if self.split is None:
            return self.sizes
        return tuple(a * b for a, b in zip(self.sizes, self.split.parts, strict=True))


@dataclass(frozen=True)
class ExpertProduct:
    """Describe a product of routed data with experts' weights.

    Attributes:
        computation: the computation that it is in.
        instruction: its name.
        parameter: position of the weights.
        expert_dims: the dims of the parameter that count experts.
        tokens_via: collectives that the data came through, as bits.
        weights_via: collectives that the weights came through.
        after: whether the data has passed through a product of experts before, as for a down
            projection.
    """

    computation: str
    instruction: str
    parameter: int
    expert_dims: tuple[int, ...]
    tokens_via: int
    weights_via: int
    after: bool = False


@dataclass(frozen=True)
class Assumption:
    """Define which dims count experts in a program that has no router.

    Attributes:
        counts_experts: whether a dim of a parameter can count experts, if it is a batch dim of a
            product, or if one element of it is used.
        only_exchanged: require that the other operand came through an all-to-all.
    """

    counts_experts: Callable[[Parameter, int], bool]
    only_exchanged: bool = False


@dataclass
class Flow:
    """Hold the outcome of the evaluation.

    Attributes:
        parameters: parameters of the ENTRY computation, by position.
        sites: {(computation, instruction): the states of a collective's operands}.
        products: the products of experts.
        gradients: (computation, instruction) of products that make the gradients of experts'
            weights.
        experts: {parameter that is weights of experts: its dims that count experts}.
        data: positions of parameters that are tokens or other input, as bits.
        weights: positions of those multiplied with data that does not depend on them, as bits.
        met: {parameter: parameters that it was multiplied with}, in products of two parameters.
        exchanges: the all-to-alls, as bits of `State.via`.
        opaque: positions of operands of kernels whose arithmetic is not in the text.
        indices: {collective: its position in `State.via`}.
        outputs: the states of what the program returns, with their shapes.
        assumed: whether experts were looked for without a router (see `opcode_rules.evaluate`).
        scored: sizes of the last dim of each input of an exponential or a sigmoid.
        gathered: {an all-gather: (parameter, dim) that it gathers}.
    """

    parameters: dict[int, Parameter]
    sites: dict[tuple[str, str], list[State]] = field(default_factory=dict)
    products: dict[tuple[str, str], ExpertProduct] = field(default_factory=dict)
    gradients: set[tuple[str, str]] = field(default_factory=set)
    data: int = 0
    weights: int = 0
    met: dict[int, set[int]] = field(default_factory=dict)
    exchanges: int = 0
    opaque: int = 0
    indices: dict[tuple[str, str], int] = field(default_factory=dict)
    experts: dict[int, set[int]] = field(default_factory=dict)
    outputs: list[tuple[State, str]] = field(default_factory=list)
    assumed: bool = False
    scored: set[int] = field(default_factory=set)
    gathered: dict[tuple[str, str], set[tuple[int, int]]] = field(default_factory=dict)

    def bit(self, site: tuple[str, str]) -> int:
        """Return the bit of a collective in `State.via`."""
        return 1 << self.indices.setdefault(site, len(self.indices))


def entry_parameters(
    module: Module, shardings: Mapping[int, str] | None = None
) -> dict[int, Parameter]:
    """Return the ENTRY parameters of a module by position.

    Args:
        module: the program.
        shardings: shardings in the same program before optimization, where its own text has none.
    """
    found: dict[int, Parameter] = {}
    for instruction in module.entry.parameters():
        shape = instruction.shape
        if shape.startswith("("):
            continue
        sizes = tuple(array_dims(shape))
        number = instruction.parameter_number
        sharding = instruction.attributes.get("sharding", (shardings or {}).get(number, ""))
        found[number] = Parameter(
            number,
            instruction.op_name,
            shape,
            sizes,
            shape_bytes(shape),
            not is_float(shape),
            parse_split(sharding, len(sizes)) if sharding else None,
            bool(sharding),
        )
    return found


def _array_shapes(shape: str) -> list[str]:
    if not shape.startswith("("):
        return [shape]
    return [array for element in tuple_elements(shape) for array in _array_shapes(element)]


def _can_have(parameter: Parameter, expert_dims: set[int], sizes: Sequence[int]) -> bool:
    """Return whether an array of these sizes can be an expert parameter, or a slice of one.

    The two dims of its matrices must be present, whole or split; dims of experts and of layers may
    be missing.
    """
    parts = parameter.split.parts if parameter.split else (1,) * len(parameter.sizes)
    possible = [
        {local * part for part in range(1, count + 1) if count % part == 0}
        for local, count in zip(parameter.sizes, parts, strict=True)
    ]
    if not parameter.sharding_known:  # its split is unknown: any multiple
        possible = [
            {local * part for part in range(1, 2 + max(sizes, default=1) // max(local, 1))}
            for local in parameter.sizes
        ]
    matrix = [dim for dim in range(len(possible)) if dim not in expert_dims][-2:]
    others = [possible[dim] for dim in range(len(possible)) if dim not in matrix]

    def fits(left: tuple[int, ...], dims: tuple[set[int], ...], optional: bool) -> bool:
        if not dims:
            return optional and not left
        if optional and not left:
            return True
        for at, size in enumerate(left):
            if size in dims[0] and fits(left[:at] + left[at + 1 :], dims[1:], optional):
                return True
        return optional and fits(left, dims[1:], optional)

    for first in range(len(sizes)):
        for second in range(len(sizes)):
            if first == second or len(matrix) < 2:
                continue
            if sizes[first] in possible[matrix[0]] and sizes[second] in possible[matrix[1]]:
                left = tuple(n for at, n in enumerate(sizes) if at not in (first, second))
                if fits(left, tuple(others), True):
                    return True
    return False


OpcodeRule = Callable[["Evaluation", Computation, Instruction, list[Value]], Value]


class Evaluation:
    """Evaluate a module; `rules` holds one function per opcode."""

    def __init__(
        self,
        module: Module,
        rules: dict[str, OpcodeRule],
        default: OpcodeRule,
        assumed: Assumption | None = None,
        shardings: Mapping[int, str] | None = None,
    ) -> None:
        self.module = module
        self.flow = Flow(entry_parameters(module, shardings))
        self._rules = rules
        self._default = default
        self._assumed = assumed
        self._known_weights = (0, 0)
        self._weight_sizes = set[tuple[int, ...]]()
        self.flow.assumed = assumed is not None
        self.flow.data = sum(
            1 << each.position for each in self.flow.parameters.values() if each.is_data
        )

    def run(self) -> Flow:
        """Evaluate the ENTRY computation."""
        entry = self.module.entry
        count = max((each.parameter_number for each in entry.parameters()), default=-1) + 1
        arguments = [self._argument(number) for number in range(count)]
        limit = sys.getrecursionlimit()
        # Calls may nest as deep as there are computations, and each needs several frames.
        sys.setrecursionlimit(limit + 8 * len(self.module.computations))
        try:
            result = self.computation(entry, arguments)
        finally:
            sys.setrecursionlimit(limit)
        shapes = _array_shapes(entry.instruction(entry.root).shape)
        states = leaves(result)
        if len(shapes) == len(states):
            self.flow.outputs = list(zip(states, shapes, strict=True))
        return self.flow

    def are_tokens(self, state: State) -> bool:
        """Return whether data can be experts' input: routed, or, without a router, computed."""
        if self._assumed is None:
            return bool(state.marks & ROUTED)
        if self._assumed.only_exchanged:
            return bool(state.via & self.flow.exchanges or state.marks & EXPERT_OUTPUT)
        return state.origin is None

    def found_experts(
        self, site: tuple[str, str], weights: State, dims: tuple[int, ...], tokens: State
    ) -> None:
        """Record a product of data with experts' weights, or with several of them joined."""
        assert weights.origin is not None
        main = self.flow.parameters[weights.origin.main]
        if tokens.origin is not None:
            self.flow.data |= tokens.origin.params
        for position, parameter in self.flow.parameters.items():
            together = weights.origin.params >> position & 1 and not parameter.is_data
            if together and len(parameter.sizes) == len(main.sizes):
                self.flow.experts.setdefault(position, set()).update(dims)
        after = bool(tokens.marks & EXPERT_OUTPUT)
        self.flow.products[site] = ExpertProduct(
            *site, main.position, dims, tokens.via, weights.via, after
        )

    def found_bias(self, bias: State, size: int) -> None:
        """Record a bias that is added to expert outputs: it has a vector per expert."""
        assert bias.origin is not None
        position = bias.origin.main
        parameter = self.flow.parameters.get(position)
        if parameter is None or self.flow.data >> position & 1 or self._assumed is not None:
            return
        large = [
            count for count in parameter.global_sizes if count > 1 or not parameter.sharding_known
        ]
        if len(large) > 1 and math.prod(parameter.sizes) < size:
            self.flow.experts.setdefault(position, set()).add(len(parameter.sizes) - 2)

    def is_like_a_weight(self, parameter: Parameter) -> bool:
        """Return whether a parameter is a weight, or has the sizes of one, as moments have."""
        flow = self.flow
        known = flow.weights, len(flow.experts)
        if known != self._known_weights:
            self._known_weights = known
            self._weight_sizes = {
                other.sizes
                for position, other in flow.parameters.items()
                if flow.weights >> position & 1 or position in flow.experts
            }
        return parameter.sizes in self._weight_sizes

    def may_count_experts(self, parameter: Parameter, dims: tuple[int, ...]) -> tuple[int, ...]:
        """Return those of these dims of a parameter that can count experts."""
        if self._assumed is None:
            return dims
        return tuple(dim for dim in dims if self._assumed.counts_experts(parameter, dim))

    def is_expert_gradient(self, first: State, second: State, shape: str) -> bool:
        """Return whether a product of two computed values is the gradient of experts' weights."""
        tokens = first.marks & ROUTED, second.marks & ROUTED
        if not (all(tokens) if self._assumed is None else any(tokens)):
            return False
        sizes = [size for size in array_dims(tuple_elements(shape)[0]) if size != 1]
        return any(
            _can_have(self.flow.parameters[position], dims, sizes)
            for position, dims in self.flow.experts.items()
        )

    def _argument(self, number: int) -> Value:
        parameter = self.flow.parameters.get(number)
        if parameter is None:
            return State(1 << number, None, 0, 0)
        origin = Origin(1 << number, number, whole(len(parameter.sizes)))
        return State(1 << number, origin, 0, 0)

    def computation(self, computation: Computation, arguments: list[Value]) -> Value:
        """Evaluate a computation and return the value of its root."""
        values: dict[str, Value] = {}
        for name, opcode in computation.opcodes.items():
            instruction = computation.instruction(name)
            if opcode == "parameter":
                number = instruction.parameter_number
                values[name] = arguments[number] if number < len(arguments) else CONSTANT
            elif opcode == "constant":
                values[name] = shaped(CONSTANT, instruction.shape)
            else:
                operands = [values.get(each, CONSTANT) for each in instruction.operands]
                rule = self._rules.get(opcode, self._default)
                try:
                    values[name] = rule(self, computation, instruction, operands)
                except (IndexError, KeyError, ValueError) as error:
                    if isinstance(error, UserError):
                        raise
                    raise instruction.damaged("its operands do not fit it") from error
        return values[computation.root]

    def called(self, instruction: Instruction, arguments: list[Value], *roles: str) -> Value:
        """Evaluate the computation that an instruction calls."""
        return self.computation(self.module.called_by(instruction, *roles), arguments)

    def loop(self, instruction: Instruction, begin: Value) -> Value:
        """Evaluate a `while`: its body once on the initial value, then on its carry."""
        body = self.module.called_by(instruction, "body")
        first = self.computation(body, [begin])
        again = carried(begin, first)
        if again == begin:
            return first
        return after_loop(first, self.computation(body, [again]))
