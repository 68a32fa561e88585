"""Determine from the program's dataflow what each collective is for (see `flow`).

Roles do not depend on the names of scopes or parameters, so they apply to anyone's program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moe_shard.lowering.flow.evaluation import Assumption, Flow, Parameter
from moe_shard.lowering.flow.opcode_rules import evaluate
from moe_shard.lowering.flow.states import (
    EXPERT_GRADIENT,
    EXPERT_OUTPUT,
    GRADIENT,
    INDICES,
    MASK,
    ROUTED,
    UPDATED,
    State,
    is_float,
)
from moe_shard.lowering.hlo import Module
from moe_shard.lowering.mesh_axes import UNKNOWN_AXES, MeshAxes
from moe_shard.lowering.shapes import array_dims, shape_bytes
from moe_shard.lowering.walk import EXCHANGE_KINDS

ROLES = (
    "weight-gather",
    "gradient-reduction",
    "update",
    "token-exchange",
    "activation-exchange",
    "activation-gather",
    "activation-reduction",
    "routing",
    "statistics",
    "unknown",
)
"""What a collective is for.

weight-gather: a parameter, or a shard of it, is moved to where it is used, by any kind of
    collective.
gradient-reduction: the gradient of a parameter is summed over devices.
update: an updated parameter, or its optimizer state, is gathered.
token-exchange: tokens move to their experts' devices or back, or their gradients do.
activation-exchange, -gather, -reduction: the same for any other computed data.
routing: indices, counts, offsets, one-hot masks of a router.
statistics: losses, norms, counts: at most `STATISTICS_BYTES`.
unknown: it cannot be read from the text.
"""

EXPERT_AXIS = "expert"
"""The mesh axis of the experts unless the caller names others."""
STATISTICS_BYTES = 1024
"""The size of scalars, token counts and offsets: up to 256 experts, 4 bytes each."""
_LEAST_SHARE = 0.01
_PERMUTES = "collective-permute"


@dataclass(frozen=True)
class Role:
    """Describe what a collective is for.

    Attributes:
        name: one of `ROLES`.
        parameters: positions of the parameters that it moves, or whose gradients; () for data.
        of_experts: whether these are weights of experts, or it moves tokens of experts.
        after_experts: whether the tokens are expert outputs.
    """

    name: str
    parameters: tuple[int, ...] = ()
    of_experts: bool = False
    after_experts: bool = False

    def stage(self, pass_: str) -> str:
        """Return the MoE stage of a collective that has no known scope.

        In the forward pass, tokens go to the experts in dispatch and come back in combine; in the
        backward pass, their gradients move in the opposite direction.
        """
        if self.name == "routing":
            return "router"
        if not self.of_experts:
            return "other"
        if self.parameters:
            return "optimizer" if self.name == "update" else "experts"
        return "combine" if self.after_experts == (pass_ != "backward") else "dispatch"


# A merged collective has the first of these roles that one of its operands has, so that expert
# weights are not hidden by another operand.
_PRECEDENCE = (
    ("weight-gather", True),
    ("gradient-reduction", True),
    ("update", True),
    ("token-exchange", True),
    ("activation-gather", True),
    ("activation-reduction", True),
)


class Roles:
    """Determine the roles of a module's collectives."""

    def __init__(
        self,
        module: Module,
        axes: MeshAxes,
        expert_axes: Sequence[str] = (),
        shardings: Mapping[int, str] | None = None,
    ) -> None:
        """Evaluate the module.

        Args:
            module: the program.
            axes: its mesh.
            expert_axes: the axes of the experts, where they are known by name.
            shardings: shardings of the ENTRY parameters by position, where the text has none.

        Raises:
            HloParseError: the text is damaged.
        """
        self._axes = axes
        self._shardings = shardings
        self.flow = evaluate(module, shardings=shardings)
        self.has_router = any(
            state.marks & ROUTED for states in self.flow.sites.values() for state in states
        ) or bool(self.flow.experts)
        if not self.flow.experts:
            self._assume(module, expert_axes)
        flow = self.flow
        _find_inputs(flow)
        self._weights = _weights(flow)
        self._near = 0
        for product in flow.products.values():
            self._near |= product.tokens_via
        self._updates = _updated(flow, self._weights)

    def _assume(self, module: Module, expert_axes: Sequence[str]) -> None:
        """Look for experts in a program whose router compares nothing: soft gates, fixed slots.

        A dim of a weight counts experts if it is a batch dim of products, is split over the
        experts' axis (over any axis, where that has no name), and is as large as a vector of
        scores: the input of an exponential or a sigmoid. Heads of attention have no such scores.
        Also, one such product must follow another, as in an MLP.

        Where the axis is called "expert", it is enough that a split stack of matrices multiplies
        data that came through an all-to-all.
        """
        wanted = set(expert_axes)
        scored = self.flow.scored

        def counts_experts(parameter: Parameter, dim: int) -> bool:
            if not parameter.sharding_known:
                return bool(wanted and scored)
            if not {parameter.sizes[dim], parameter.global_sizes[dim]} & scored:
                return False
            axes = self.split_axes(parameter, dim)
            return bool(wanted & set(axes)) if wanted else bool(axes)

        def is_split(parameter: Parameter, dim: int) -> bool:
            return EXPERT_AXIS in self.split_axes(parameter, dim) or not parameter.sharding_known

        assumed = evaluate(module, Assumption(counts_experts), self._shardings)
        if any(product.after for product in assumed.products.values()):
            self.flow = assumed
        elif wanted == {EXPERT_AXIS}:
            exchanged = Assumption(is_split, only_exchanged=True)
            assumed = evaluate(module, exchanged, self._shardings)
            if assumed.experts:
                self.flow = assumed

    def split_axes(self, parameter: Parameter, dim: int) -> tuple[str, ...]:
        """Return the mesh axes over which a dim of a parameter is split."""
        if parameter.split is None or dim >= len(parameter.split.parts):
            return ()
        groups = parameter.split.device_groups[dim]
        axes = self._axes.of_groups(groups) if groups else ()
        return () if axes == UNKNOWN_AXES else axes

    def expert_axes(self, along: Mapping[tuple[str, str], tuple[str, ...]]) -> tuple[str, ...]:
        """Return the mesh axes over which the expert dims of the experts' weights are split.

        Args:
            along: {collective: its axes}, for a text without the parameters' shardings: then the
                axes along which experts are gathered, or tokens move to them.
        """
        found: dict[str, None] = {}
        for position, dims in self.flow.experts.items():
            for dim in sorted(dims):
                axes = self.split_axes(self.flow.parameters[position], dim)
                found.update(dict.fromkeys(axes))
        if not found:
            for site, gathered in self.flow.gathered.items():
                if any(dim in self.flow.experts.get(at, ()) for at, dim in gathered):
                    found.update(dict.fromkeys(along.get(site, ())))
        if not found:
            for site in self._exchanges():
                found.update(dict.fromkeys(along.get(site, ())))
        return tuple(axis for axis in found if (axis,) != UNKNOWN_AXES)

    def _exchanges(self) -> list[tuple[str, str]]:
        """Return the collectives by which tokens reached a product of experts."""
        return [site for site, at in self.flow.indices.items() if self._near >> at & 1]

    def is_split_over(
        self,
        position: int,
        axes: Iterable[str],
        along: Mapping[tuple[str, str], tuple[str, ...]],
    ) -> bool:
        """Return whether any dim of a parameter is split over any of these axes.

        Where the text has no sharding, it is if it is gathered over them, or tokens move to it.
        """
        parameter = self.flow.parameters[position]
        wanted = set(axes)
        if parameter.sharding_known:
            dims = range(len(parameter.sizes))
            return any(wanted & set(self.split_axes(parameter, dim)) for dim in dims)
        via = 0
        for product in self.flow.products.values():
            if product.parameter == position:
                via |= product.weights_via | product.tokens_via
        return any(
            via >> at & 1 and wanted & set(along.get(site, ()))
            for site, at in self.flow.indices.items()
        )

    def paths(self, positions: Iterable[int]) -> tuple[str, ...]:
        """Return the parameters' paths in the source, or `argument 3` where the text has none."""
        return tuple(
            self.flow.parameters[position].path or f"argument {position}"
            for position in sorted(positions)
            if position in self.flow.parameters
        )

    def of(self, site: tuple[str, str], kind: str, shapes: Sequence[str]) -> Role:
        """Return the role of a collective.

        Args:
            site: the computation and the name of the instruction.
            kind: one of `walk.KINDS`.
            shapes: shapes of its operands.
        """
        states = self.flow.sites.get(site)
        if not states or len(states) > len(shapes):
            return Role("unknown")
        sized = [
            (shape_bytes(shape), self._of_operand(site, kind, state, shape))
            for state, shape in zip(states, shapes, strict=False)
        ]
        sizes = [size for size, _ in sized]
        least = min(_LEAST_SHARE * sum(sizes), max(sizes))  # of many alike none has that share
        large = [each for each in sized if each[0] >= least]
        weights = Counter[tuple[str, bool]]()
        for size, role in large:
            weights[role.name, role.of_experts] += size
        first = next(
            (each for each in _PRECEDENCE if each in weights), weights.most_common(1)[0][0]
        )
        same = [role for _, role in large if (role.name, role.of_experts) == first]
        parameters = {each for role in same for each in role.parameters}
        return replace(same[0], parameters=tuple(sorted(parameters)))

    def _of_operand(self, site: tuple[str, str], kind: str, state: State, shape: str) -> Role:
        flow, size = self.flow, shape_bytes(shape)
        bit = 1 << flow.indices[site]
        origin = state.origin
        if origin is not None:
            positions = _positions(origin.params & ~flow.data)
            if positions:
                main = [each for each in positions if each in flow.experts]
                return Role("weight-gather", tuple(positions), bool(main))
            if not origin.params:
                return Role("routing")
        updated = self._updates.get(bit, ())
        if updated and not self._is_gradient(kind, state, size, updated):
            updated = ()  # it only shares an output with gradients, as a loss merged with them
        experts = tuple(each for each in updated if each in flow.experts)
        if experts or (state.marks & EXPERT_GRADIENT and not updated):
            if size <= STATISTICS_BYTES:
                return Role("statistics")
            gathers = kind in ("all-gather", "collective-broadcast")
            name = "update" if gathers else "gradient-reduction"
            return Role(name, experts or tuple(flow.experts), True)
        if state.marks & UPDATED and kind not in ("all-reduce", "reduce-scatter"):
            return Role("update", updated)
        after = bool(state.marks & EXPERT_OUTPUT)
        near = after or bool(self._near & bit)
        is_mask = state.marks & (INDICES | MASK) and not state.marks & ROUTED
        if is_mask and not (near and kind in EXCHANGE_KINDS):
            return Role("routing")
        if kind in EXCHANGE_KINDS or (kind == _PERMUTES and state.marks & ROUTED):
            tokens = near and bool(state.marks & ROUTED or flow.assumed)
            return Role("token-exchange" if tokens else "activation-exchange", (), tokens, after)
        if updated and kind != "all-gather":
            small = size <= STATISTICS_BYTES
            return Role("statistics") if small else Role("gradient-reduction", updated)
        if size <= STATISTICS_BYTES:
            return Role("statistics")
        if kind == _PERMUTES:
            return Role("activation-exchange", (), near, after)
        gathers = kind in ("all-gather", "collective-broadcast")
        # A vector holds no tokens: it is the gradient of a norm's scale.
        tokens = near and not shape.startswith("(") and sum(n > 1 for n in array_dims(shape)) > 1
        return Role("activation-gather" if gathers else "activation-reduction", (), tokens, after)

    def _is_gradient(self, kind: str, state: State, size: int, updated: tuple[int, ...]) -> bool:
        """Return whether a value that flows into parameters' outputs is part of their gradients."""
        if state.marks & EXPERT_GRADIENT:
            return True
        if kind in EXCHANGE_KINDS or kind == _PERMUTES:
            return bool(state.marks & GRADIENT) and not state.marks & ROUTED
        if state.marks & (GRADIENT | UPDATED):
            return True
        # Gradients of vectors are sums, not products, in half, once or twice the parameter's width.
        return any(2 * size % self.flow.parameters[each].bytes == 0 for each in updated)


def _positions(bits: int) -> list[int]:
    return [at for at in range(bits.bit_length()) if bits >> at & 1]


def _find_inputs(flow: Flow) -> None:
    """Distinguish inputs from weights where a product has two parameters.

    What is multiplied with a weight is data. Of two unknown parameters, the one that is multiplied
    with more others is data: an input meets several weights, each of which meets only the input.
    """
    for one, others in flow.met.items():
        for other in others:
            is_weight = [flow.weights >> each & 1 or each in flow.experts for each in (one, other)]
            if flow.data >> one & 1 or is_weight[0]:
                continue
            if flow.data >> other & 1:
                flow.weights |= 1 << one
                continue
            counts = len(others), len(flow.met[other])
            ranks = (len(flow.parameters[each].sizes) for each in (one, other))
            if is_weight[1] or (counts[0], next(ranks)) > (counts[1], next(ranks)):
                flow.data |= 1 << one
                flow.weights |= 1 << other


def _weights(flow: Flow) -> set[int]:
    """Return the parameters that are weights: those multiplied with data, and optimizer state."""
    shapes = {flow.parameters[at].shape.split("{")[0] for at in _positions(flow.weights)}
    shapes |= {flow.parameters[at].shape.split("{")[0] for at in flow.experts}
    return {
        position
        for position, parameter in flow.parameters.items()
        if not flow.data >> position & 1
        and (flow.weights >> position & 1 or parameter.shape.split("{")[0] in shapes)
    }


def _updated(flow: Flow, weights: set[int]) -> dict[int, tuple[int, ...]]:
    """Return {bit of a collective: the parameters into whose outputs its result flows}.

    An output of the shape of a weight is its gradient or its updated value. Weights and outputs of
    equal shape are paired in order, as the leaves of two equal trees are.
    """
    by_shape: dict[str, list[int]] = {}
    for position in sorted(weights):
        by_shape.setdefault(flow.parameters[position].shape.split("{")[0], []).append(position)
    met: dict[str, int] = {}
    found: dict[int, set[int]] = {}
    for state, shape in flow.outputs:
        key = shape.split("{")[0]
        positions = by_shape.get(key)
        if not positions or not is_float(shape):
            continue
        at = met.get(key, 0)
        met[key] = at + 1
        if state.origin is not None:
            continue
        for index in _positions(state.via):
            found.setdefault(1 << index, set()).add(positions[at % len(positions)])
    primary = set(_positions(flow.weights)) | set(flow.experts)
    return {
        bit: tuple(sorted(positions & primary or positions)) for bit, positions in found.items()
    }
