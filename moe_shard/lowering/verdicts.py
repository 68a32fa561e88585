"""Judge by the roles of the collectives whether experts are expert-parallel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_shard.lowering.collectives import Collective, Extraction
from moe_shard.lowering.mesh_axes import UNKNOWN_AXES
from moe_shard.lowering.roles import STATISTICS_BYTES
from moe_shard.units import human_bytes

_MOVES_WEIGHTS = frozenset({"weight-gather", "gradient-reduction"})
_MOVES_TOKENS = frozenset({"activation-gather", "activation-reduction"})
# Indices and scores move along with the tokens: they are this much smaller.
_SMALL_FRACTION = 16
_SHOWN = 4


@dataclass(frozen=True)
class Verdict:
    """Hold the verdict on a program.

    Attributes:
        name: one of `verdict_names.VERDICTS`.
        axes: the mesh axes of the experts.
        reasons: the reasons for it, a line each.
    """

    name: str
    axes: tuple[str, ...]
    reasons: tuple[str, ...] = ()


def judge(extraction: Extraction) -> Verdict:
    """Judge whether the experts are expert-parallel or silently FSDP.

    expert-parallel: tokens move by all-to-all over the experts' axis, and neither weights of
    experts nor their tokens are gathered or reduced over it. weight-gathered: weights of experts
    are gathered, or their gradients reduced, over it. mixed: both. no-expert-parallelism: the axis
    has size 1, no MoE layer was found, or its weights are not split over the axis. unknown: there
    is an MoE layer, and what it does is none of these, or cannot be read from the text.

    A gather along unknown axes ("?") counts as one along the experts' axis, so that the verdict is
    never better than the program.
    """
    axes = extraction.expert_axes
    roles, along = extraction.roles, extraction.along
    if extraction.module.is_before_optimization:
        return Verdict("unknown", axes, ("the module before optimization has no collectives yet",))
    if extraction.module.num_devices == 1:
        return Verdict("no-expert-parallelism", (), ("the program runs on one device",))
    experts = roles.flow.experts
    if not experts:
        return _without_experts(extraction)
    if not axes:
        return Verdict("no-expert-parallelism", (), ("no axis splits the experts",))
    split = [position for position in experts if roles.is_split_over(position, axes, along)]
    return weigh(extraction.collectives, axes, set(roles.paths(split)))


def weigh(collectives: Iterable[Collective], axes: tuple[str, ...], split: set[str]) -> Verdict:
    """Judge the collectives of a program that has experts.

    Args:
        collectives: the collectives of the whole step.
        axes: the mesh axes of the experts, at least one.
        split: paths of the experts' weights that are split over them.
    """
    wanted = set(axes)
    inside = [
        each
        for each in collectives
        if each.of_experts
        and each.bytes > STATISTICS_BYTES
        and (wanted & set(each.axes) or each.axes == UNKNOWN_AXES)
    ]
    exchanges = [
        each for each in inside if each.role == "token-exchange" and each.axes != UNKNOWN_AXES
    ]
    largest = max((each.bytes for each in exchanges), default=0)
    weights = [
        each for each in inside if each.role in _MOVES_WEIGHTS and split & set(each.parameter or ())
    ]
    tokens = [
        each
        for each in inside
        if each.role in _MOVES_TOKENS and each.bytes * _SMALL_FRACTION > largest
    ]
    if weights:
        name = "mixed" if exchanges else "weight-gathered"
        return Verdict(name, axes, tuple(_lines(weights, axes)))
    if exchanges and not tokens:
        return Verdict("expert-parallel", axes)
    if exchanges:
        return Verdict("mixed", axes, tuple(_lines(tokens, axes)))
    if tokens:
        lines = [
            "tokens are gathered and reduced, not moved by all-to-all; no weights are gathered",
            *_lines(tokens, axes),
        ]
        return Verdict("unknown", axes, tuple(lines))
    over = ", ".join(axes)
    reason = f"no collective over {over} moves tokens or weights of experts"
    if not split:
        reason = f"the experts' weights are not split over {over}"
    return Verdict("no-expert-parallelism", axes, (reason,))


def _without_experts(extraction: Extraction) -> Verdict:
    """Judge a program in which no product of experts was found."""
    axes, flow = extraction.expert_axes, extraction.roles.flow
    if not axes:
        return Verdict("no-expert-parallelism", (), ("no mesh axis larger than 1 is for experts",))
    hidden = [
        position
        for position in flow.parameters
        if flow.opaque >> position & 1
        and extraction.roles.is_split_over(position, axes, extraction.along)
    ]
    if hidden:
        paths = ", ".join(extraction.roles.paths(hidden)[:_SHOWN])
        return Verdict(
            "unknown", axes, (f"{paths} is read by a kernel whose arithmetic is unknown",)
        )
    large = [
        each
        for each in extraction.collectives
        if set(axes) & set(each.axes) and each.bytes > STATISTICS_BYTES
    ]
    if large and not flow.parameters:
        return Verdict("unknown", axes, ("the program's parameters cannot be read from its text",))
    if large and extraction.roles.has_router:
        return Verdict(
            "unknown", axes, ("data is routed, but no product of experts was found in the text",)
        )
    return Verdict("no-expert-parallelism", axes, ("no MoE layer was found",))


def _lines(collectives: Iterable[Collective], axes: tuple[str, ...]) -> list[str]:
    """List what moves, one line per parameter and kind, the most bytes first."""
    sums: dict[tuple[str, str, str], tuple[int, int, str]] = {}
    for each in collectives:
        what = ", ".join((each.parameter or ("tokens of experts",))[:_SHOWN])
        key = (each.role, each.label, what)
        count, size, source = sums.get(key, (0, 0, ""))
        sums[key] = (
            count + each.count,
            size + each.count * each.bytes,
            source or each.source or "",
        )
    over = ", ".join(axes)
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    lines = [
        f"{role} over {over}: {what}, {count} {label}, {human_bytes(size)}"
        + (f" ({source})" if source else "")
        for (role, label, what), (count, size, source) in ordered[:_SHOWN]
    ]
    rest = len(ordered) - _SHOWN
    return [*lines, f"and {rest} more"] if rest > 0 else lines
