"""Find dims that want the same mesh axis: which stays unsharded, the consequence, and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_shard.sharding.explain.lint import NOTE, WARNING, Lint, brief_names
from moe_shard.sharding.explain.placed import PlacedArray, rule_json
from moe_shard.sharding.rules import Decision, Loss, NumberedRule


@dataclass(frozen=True)
class Collision:
    """Describe a dim left unsharded because another has its axes; the same for several arrays.

    Attributes:
        dim: the logical axis that stays unsharded; Flax drops it silently.
        rule: the first rule that was tried for it; those below it lost as well.
        axes: the mesh axes that were taken.
        held_by: the logical axis that has them.
        holder: the rule by which it has them.
        consequence: what follows from that.
        fix: what to do about it.
        arrays: the arrays that it concerns.
        bytes_per_device: bytes of these arrays, as they are placed.
        bytes_if_won: bytes of these arrays if the rule had won.
        only_if: the setting under which it happens, where that is not the one explained.
    """

    dim: str
    rule: NumberedRule
    axes: tuple[str, ...]
    held_by: str
    holder: NumberedRule
    consequence: str
    fix: str
    arrays: tuple[str, ...]
    bytes_per_device: int
    bytes_if_won: int
    only_if: str = ""

    @property
    def cause(self) -> str:
        """Return which rule lost which axes to which other dim."""
        return (
            f"{self.rule} lost {', '.join(self.axes)} to '{self.held_by}', placed by {self.holder}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return an object of `moe-shard explain --json`."""
        return {
            "dim": self.dim,
            "arrays": list(self.arrays),
            "axes": list(self.axes),
            "lost": rule_json(self.rule),
            "held_by": self.held_by,
            "won": rule_json(self.holder),
            "cause": self.cause,
            "consequence": self.consequence,
            "cure": self.fix,  # keys of the JSON are published and stay
            "bytes_per_device": self.bytes_per_device,
            "bytes_per_device_if_won": self.bytes_if_won,
            "only_if": self.only_if or None,
        }


def find_collisions(
    placed: Sequence[PlacedArray], rules: Sequence[NumberedRule]
) -> list[Collision]:
    """Collect the conflicts of all arrays, merging those with the same cause and consequence.

    Args:
        placed: the arrays.
        rules: the table.
    """
    groups: dict[tuple[str, int, str, str], list[tuple[PlacedArray, Decision]]] = {}
    for array in placed:
        for decision in array.resolution.conflicts:
            loss = decision.lost[0]
            key = (decision.logical_axis or "", loss.rule.number, loss.held_by)
            is_first = decision is array.resolution.decisions[0]
            stated = array.array.consequence if is_first else ""
            groups.setdefault((*key, stated), []).append((array, decision))
    found = []
    for (dim, _, held_by, stated), members in groups.items():
        array, decision = members[0]
        loss = decision.lost[0]
        # Layers give "consequence; fix"; without it, both are derived from sizes and rules.
        consequence, _, fix = stated.partition("; ")
        now = sum(each.bytes_per_device for each, _ in members)
        copies = array.parts(loss.mesh_axes)
        holder = next(d.won for d in array.resolution.decisions if d.logical_axis == held_by)
        assert holder is not None, "a dim that holds axes has them by a rule"
        axes = loss.taken
        found.append(
            Collision(
                dim=dim,
                rule=loss.rule,
                axes=axes,
                held_by=held_by,
                holder=holder,
                consequence=consequence or f"every device holds {copies} times as much of it",
                fix=fix or _fix_of(array, decision, axes, holder, rules),
                arrays=tuple(each.array.name for each, _ in members),
                bytes_per_device=now,
                bytes_if_won=now // copies,
            )
        )
    return found


def _fix_of(
    array: PlacedArray,
    decision: Decision,
    axes: Sequence[str],
    holder: NumberedRule,
    rules: Sequence[NumberedRule],
) -> str:
    rule, last = decision.lost[0].rule, decision.lost[-1].rule
    held = {axis for other in array.resolution.decisions for axis in other.mesh_axes}
    taken = ", ".join(axes)
    # With the loser's rule first, the holder would need a rule without these axes.
    spare = next(
        (
            other
            for other in rules
            if other.logical_axis == holder.logical_axis
            and not set(other.mesh_axes) & set(rule.mesh_axes)
        ),
        None,
    )
    if spare is not None:
        return (
            f"move rule {rule.number} above rule {holder.number}: rule {spare.number} "
            f"[{', '.join(spare.mesh_axes)}] then serves '{holder.logical_axis}'"
        )
    if rest := [axis for axis in decision.lost[0].mesh_axes if axis not in held]:
        return (
            f"add ['{rule.logical_axis}', [{', '.join(rest)}]] below rule {last.number}, or leave "
            f"{taken} out of rule {holder.number}"
        )
    return (
        f"leave {taken} out of rule {holder.number}, or move rule {rule.number} above it (then "
        f"'{holder.logical_axis}' stays unsharded)"
    )


def find_uneven(placed: Sequence[PlacedArray]) -> list[Lint]:
    """Find dims that their mesh axes do not divide, possible only where sizes are assumed."""
    arrays: dict[tuple[NumberedRule, int, tuple[str, ...], int], list[str]] = {}
    for array in placed:
        for decision in array.resolution.decisions:
            parts = array.parts(decision.mesh_axes)
            if decision.won is not None and decision.size % parts:
                key = (decision.won, decision.size, decision.mesh_axes, parts)
                arrays.setdefault(key, []).append(array.array.name)
    return [
        Lint(
            WARNING,
            "uneven",
            (rule.number,),
            f"the dim '{rule.logical_axis}' of size {size} ({brief_names(names)}) is not divisible "
            f"by {' * '.join(axes)} = {parts}",
        )
        for (rule, size, axes, parts), names in arrays.items()
    ]


def find_alternatives(placed: Sequence[PlacedArray]) -> list[Lint]:
    """Find pairs of dims that want one axis, where a later rule of the loser was used."""
    pairs: dict[tuple[NumberedRule, NumberedRule, str, tuple[str, ...]], list[str]] = {}
    for array in placed:
        for decision in array.resolution.decisions:
            loss = next((loss for loss in decision.lost if loss.held_by), None)
            if decision.won is not None and loss is not None:
                key = (loss.rule, decision.won, loss.held_by, loss.taken)
                pairs.setdefault(key, []).append(array.array.name)
    return [
        Lint(
            NOTE,
            "alternative",
            (rule.number, won.number),
            f"'{rule.logical_axis}' and '{held_by}' both want {', '.join(axes)} in "
            f"{brief_names(names)}: '{held_by}' has it, rule {won.number} "
            f"[{', '.join(won.mesh_axes)}] is used instead of rule {rule.number}",
        )
        for (rule, won, held_by, axes), names in pairs.items()
    ]


def find_passed_over(placed: Sequence[PlacedArray]) -> list[Lint]:
    """Find rules that do not divide a dim, where a later rule then placed it."""
    arrays: dict[tuple[Loss, NumberedRule], list[str]] = {}
    for array in placed:
        for decision in array.resolution.decisions:
            for loss in decision.lost:
                if decision.won is not None and not loss.held_by:
                    arrays.setdefault((loss, decision.won), []).append(array.array.name)
    return [
        Lint(
            NOTE,
            "passed-over",
            (loss.rule.number, won.number),
            f"{loss} ({brief_names(names)}): rule {won.number} [{', '.join(won.mesh_axes)}] is "
            "used instead",
        )
        for (loss, won), names in arrays.items()
    ]
