"""Find what is wrong with a rule table itself, whatever its mesh and whoever wrote it.

A rule is judged as Flax reads it, with every mesh axis larger than 1. It is tried on a dim that has
no placement yet and applies if none of its mesh axes is held by another dim. So an earlier rule of
the same logical axis, say P, must have lost before rule R is tried: some axis of P was held then,
by a dim that a still earlier rule placed, and what is held stays held. Hence R can never win

- if some P names no axis beyond those of R (P is a subset of R; equal is a duplicate, empty always
  applies): whatever beat P beats R. This holds for any array and any mesh.
- if for some P there is no rule before it, of another logical axis and able to win, that takes an
  axis of P and none of R: P cannot lose without R losing too. This holds for any array, as long as
  the rules above P stay what they are.

Both are proofs that a rule is dead. A rule that passes both may still be dead for subtler reasons.

Training here also passes over a rule whose axes do not divide the dim. The first proof still holds:
a dim that P does not divide, R does not divide either. The second no longer does: R is used where P
does not divide the dim, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_shard.sharding.annotate import AnnotatedArray
from moe_shard.sharding.rules import NumberedRule

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)


@dataclass(frozen=True)
class Lint:
    """Hold one finding about a rule table.

    Attributes:
        level: "error" (nothing can be placed by this table as it stands), "warning" (it does not
            do what it seems to do), or "note".
        kind: its name in scripts, such as "duplicate".
        rules: numbers of the rules concerned, counted from 1.
        text: one sentence.
    """

    level: str
    kind: str
    rules: tuple[int, ...]
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return an object of `moe-shard explain --json`."""
        return {
            "level": self.level,
            "kind": self.kind,
            "rows": list(self.rules),  # keys of the JSON are published and stay
            "text": self.text,
        }


def number_rules(rules: Iterable[tuple[str, Sequence[str]]]) -> tuple[NumberedRule, ...]:
    """Number the rules of a table from 1."""
    return tuple(
        NumberedRule(number, name, tuple(axes)) for number, (name, axes) in enumerate(rules, 1)
    )


def lint_rules(
    rules: Sequence[NumberedRule],
    mesh_axes: Sequence[str],
    *,
    by_flax: bool = True,
    is_maxtexts: bool = False,
) -> list[Lint]:
    """List all findings about a table that need no model.

    Args:
        rules: the table.
        mesh_axes: the axes that its rules may name.
        by_flax: see `dead_rules`.
        is_maxtexts: whether the table is one of MaxText's, where an axis that the mesh does not
            have is no error: it silently counts as size 1.
    """
    found = [lint for rule in rules for lint in _lint_axes(rule, mesh_axes, is_maxtexts)]
    found += dead_rules(rules, by_flax=by_flax)
    named = {axis for rule in rules for axis in rule.mesh_axes}
    if unused := [axis for axis in mesh_axes if axis not in named]:
        text = f"no rule names the mesh {_axes(unused)}: only copies lie along it"
        found.append(Lint(NOTE, "unused-axis", (), text))
    return found


def _lint_axes(rule: NumberedRule, mesh_axes: Sequence[str], is_maxtexts: bool) -> list[Lint]:
    found = []
    if unknown := [axis for axis in rule.mesh_axes if axis not in mesh_axes]:
        text = f"{rule} names the mesh {_axes(unknown)}, which mesh_axes does not have"
        level, then = (ERROR, "remove it or add it")
        if is_maxtexts:
            level, then = (WARNING, "MaxText takes it for size 1 without a word, and so is it here")
        found.append(Lint(level, "unknown-axis", (rule.number,), f"{text}; {then}"))
    if twice := sorted({axis for axis in rule.mesh_axes if rule.mesh_axes.count(axis) > 1}):
        text = f"{rule} names the mesh {_axes(twice)} twice; name it once"
        found.append(Lint(ERROR, "repeated-axis", (rule.number,), text))
    return found


def dead_rules(rules: Sequence[NumberedRule], *, by_flax: bool = True) -> list[Lint]:
    """Find the rules that can never win, by the two proofs at the top of this file.

    Args:
        rules: the table.
        by_flax: whether the table is applied as Flax does, which ignores sizes. If not, a rule
            found by the second proof is a note, as it is used where an earlier one does not divide
            the dim.
    """
    found = []
    alive: list[NumberedRule] = []
    for rule in rules:
        rivals = [
            each for each in rules[: rule.number - 1] if each.logical_axis == rule.logical_axis
        ]
        lint = _shadowed(rule, rivals)
        if lint is None and (rival := _unbeaten(rule, rivals, alive)):
            lint = _unreachable(rule, rival) if by_flax else _by_size(rule, rival)
        if lint is None or lint.level == NOTE:
            alive.append(rule)
        if lint is not None:
            found.append(lint)
    return found


def _shadowed(rule: NumberedRule, rivals: Sequence[NumberedRule]) -> Lint | None:
    own = set(rule.mesh_axes)
    for rival in rivals:
        theirs = set(rival.mesh_axes)
        numbers = (rule.number, rival.number)
        if theirs == own:
            return Lint(WARNING, "duplicate", numbers, f"{rule} repeats {rival}")
        if not theirs:
            text = f"{rule} can never win: {rival} comes first and always applies"
            return Lint(WARNING, "shadowed", numbers, text)
        if theirs < own:
            text = (
                f"{rule} can never win: {rival} comes first and names only a part of its axes, so "
                "whatever beats that beats this"
            )
            return Lint(WARNING, "shadowed", numbers, text)
    return None


def _unbeaten(
    rule: NumberedRule, rivals: Sequence[NumberedRule], alive: Sequence[NumberedRule]
) -> NumberedRule | None:
    """Return the first rival that no collision can keep from winning before `rule`."""
    own = set(rule.mesh_axes)
    return next((rival for rival in rivals if not _can_lose(rival, own, alive)), None)


def _unreachable(rule: NumberedRule, rival: NumberedRule) -> Lint:
    text = (
        f"{rule} can never win: it would need {rival} to lose {_spared(rule, rival)} alone, and no "
        "rule above takes that and leaves the rest; move the rules of the other dims above"
    )
    return Lint(WARNING, "unreachable", (rule.number, rival.number), text)


def _by_size(rule: NumberedRule, rival: NumberedRule) -> Lint:
    text = (
        f"{rule} serves only where {rival} does not divide the dim: no rule above takes "
        f"{_spared(rule, rival)} and leaves the rest"
    )
    return Lint(NOTE, "by-size", (rule.number, rival.number), text)


def _spared(rule: NumberedRule, rival: NumberedRule) -> str:
    return ", ".join(axis for axis in rival.mesh_axes if axis not in rule.mesh_axes)


def _can_lose(rival: NumberedRule, spared: set[str], alive: Sequence[NumberedRule]) -> bool:
    """Return whether an earlier rule can beat `rival` and leave the axes `spared` free."""
    contested = set(rival.mesh_axes) - spared
    return any(
        other.number < rival.number
        and other.logical_axis != rival.logical_axis
        and contested & set(other.mesh_axes)
        and not spared & set(other.mesh_axes)
        for other in alive
    )


def missing_rules(
    arrays: Iterable[AnnotatedArray], rules: Sequence[NumberedRule]
) -> dict[str, list[str]]:
    """Find logical axes of a model that a table has no rule for, with the arrays that have them."""
    known = {rule.logical_axis for rule in rules}
    missing: dict[str, list[str]] = {}
    for array in arrays:
        for axis in array.logical_axes:
            if axis is not None and axis not in known:
                missing.setdefault(axis, []).append(array.name)
    return missing


def lint_model(
    arrays: Sequence[AnnotatedArray], rules: Sequence[NumberedRule], *, is_maxtexts: bool = False
) -> list[Lint]:
    """Find what a table lacks for a model, and how many of its rules the model does not use."""
    found = []
    missing = missing_rules(arrays, rules)
    if missing and is_maxtexts:
        found += _unsharded(list(missing))
        missing = {}
    for axis, names in missing.items():
        text = (
            f"no rule for '{axis}' ({brief_names(names)}): Flax leaves the dim unsharded without a "
            f"word, training here refuses it; add ['{axis}', []] or name mesh axes"
        )
        found.append(Lint(WARNING, "no-row", (), text))
    used = {axis for array in arrays for axis in array.logical_axes}
    idle = [rule for rule in rules if rule.logical_axis not in used]
    if idle:
        # Rules added by the user are the last of the table, so they are named first.
        names = list(dict.fromkeys(f"'{rule.logical_axis}'" for rule in reversed(idle)))
        text = (
            f"{len(idle)} of {len(rules)} rules are of logical axes that this model does not have: "
            f"{brief_names(names)}"
        )
        found.append(Lint(NOTE, "idle", tuple(rule.number for rule in idle), text))
    return found


def _unsharded(missing: Sequence[str]) -> list[Lint]:
    """Describe what a MaxText table leaves unsharded because it has no rule for it."""
    flag = "activation_batch_no_exp"
    found = []
    if others := [axis for axis in missing if axis != flag]:
        text = f"no rule for {', '.join(others)}: not sharded, as in MaxText"
        found.append(Lint(NOTE, "no-row", (), text))
    if flag in missing:
        text = (
            f"no rule for {flag}, here left unsharded: where its flag is on, MaxText takes the "
            "experts' axes off activation_batch_moe instead, and so does training here"
        )
        found.append(Lint(NOTE, "no-row", (), text))
    return found


def count_levels(found: Iterable[Lint]) -> Mapping[str, int]:
    """Count the findings of each level."""
    levels = [lint.level for lint in found]
    return {level: levels.count(level) for level in SEVERITIES}


def _axes(axes: Sequence[str]) -> str:
    return f"{'axis' if len(axes) == 1 else 'axes'} {', '.join(repr(axis) for axis in axes)}"


def brief_names(names: Sequence[str]) -> str:
    """Name the first three and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
