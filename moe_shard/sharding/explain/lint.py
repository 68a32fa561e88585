"""Find what is wrong with a rule table by itself, whatever its mesh and whoever wrote it.

A row is judged as Flax reads it, with every mesh axis larger than 1. It is tried on a dim that has
no placement yet and applies if none of its mesh axes is held by another dim. So an earlier row of
the same logical axis, say P, must have lost before row R is tried: some axis of P was held then,
by a dim that a still earlier row placed, and what is held stays held. Hence R can never win

- if some P names no axis beyond those of R (P is a subset of R; equal is a duplicate, empty always
  applies): whatever beat P beats R. This holds for any array and any mesh.
- if for some P there is no row before it, of another logical axis and able to win, that takes an
  axis of P and none of R: P cannot lose without R losing too. This holds for any array, as long as
  the rows above P stay what they are.

Both are proofs that a row is dead. A row that passes both may still be dead for subtler reasons.

Training here also passes a row over whose axes do not divide the dim. The first proof stands: what
P does not divide for, R does not either. By the second R is not dead then: it serves where P does
not divide, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_shard.sharding.annotate import AnnotatedArray
from moe_shard.sharding.rules import Row

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)


@dataclass(frozen=True)
class Lint:
    """Hold one finding about a rule table.

    Attributes:
        level: "error" (nothing can be placed by this table as it stands), "warning" (it does not
            do what it seems to do), or "note".
        kind: a name for scripts, such as "duplicate".
        rows: numbers of the rows in question, counted from 1.
        text: one sentence.
    """

    level: str
    kind: str
    rows: tuple[int, ...]
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return an object of `moe-shard explain --json`."""
        return {"level": self.level, "kind": self.kind, "rows": list(self.rows), "text": self.text}


def number_rows(rules: Iterable[tuple[str, Sequence[str]]]) -> tuple[Row, ...]:
    """Number the rules of a table from 1."""
    return tuple(Row(number, name, tuple(axes)) for number, (name, axes) in enumerate(rules, 1))


def lint_rows(
    rows: Sequence[Row],
    mesh_axes: Sequence[str],
    *,
    by_flax: bool = True,
    is_maxtexts: bool = False,
) -> list[Lint]:
    """List all findings about a table that need no model.

    Args:
        rows: the table.
        mesh_axes: those that its rows may name.
        by_flax: see `dead_rows`.
        is_maxtexts: the table is one of MaxText's, where an axis that the mesh does not have is
            no error: it is taken to have size 1, in silence.
    """
    found = [lint for row in rows for lint in _lint_axes(row, mesh_axes, is_maxtexts)]
    found += dead_rows(rows, by_flax=by_flax)
    named = {axis for row in rows for axis in row.mesh_axes}
    if unused := [axis for axis in mesh_axes if axis not in named]:
        text = f"no row names the mesh {_axes(unused)}: only copies lie along it"
        found.append(Lint(NOTE, "unused-axis", (), text))
    return found


def _lint_axes(row: Row, mesh_axes: Sequence[str], is_maxtexts: bool) -> list[Lint]:
    found = []
    if unknown := [axis for axis in row.mesh_axes if axis not in mesh_axes]:
        text = f"{row} names the mesh {_axes(unknown)}, which mesh_axes does not have"
        level, then = (ERROR, "remove it or add it")
        if is_maxtexts:
            level, then = (WARNING, "MaxText takes it for size 1 without a word, and so is it here")
        found.append(Lint(level, "unknown-axis", (row.number,), f"{text}; {then}"))
    if twice := sorted({axis for axis in row.mesh_axes if row.mesh_axes.count(axis) > 1}):
        text = f"{row} names the mesh {_axes(twice)} twice; name it once"
        found.append(Lint(ERROR, "repeated-axis", (row.number,), text))
    return found


def dead_rows(rows: Sequence[Row], *, by_flax: bool = True) -> list[Lint]:
    """Find the rules that can never win, by the two proofs at the top of this file.

    Args:
        rows: the table.
        by_flax: whether it is applied as Flax does, which knows no sizes. If not, a row found by
            the second proof is a note, as it serves where an earlier one does not divide.
    """
    found = []
    alive: list[Row] = []
    for row in rows:
        rivals = [each for each in rows[: row.number - 1] if each.logical_axis == row.logical_axis]
        lint = _shadowed(row, rivals)
        if lint is None and (rival := _unbeaten(row, rivals, alive)):
            lint = _unreachable(row, rival) if by_flax else _by_size(row, rival)
        if lint is None or lint.level == NOTE:
            alive.append(row)
        if lint is not None:
            found.append(lint)
    return found


def _shadowed(row: Row, rivals: Sequence[Row]) -> Lint | None:
    own = set(row.mesh_axes)
    for rival in rivals:
        theirs = set(rival.mesh_axes)
        numbers = (row.number, rival.number)
        if theirs == own:
            return Lint(WARNING, "duplicate", numbers, f"{row} repeats {rival}")
        if not theirs:
            text = f"{row} can never win: {rival} comes first and always applies"
            return Lint(WARNING, "shadowed", numbers, text)
        if theirs < own:
            text = (
                f"{row} can never win: {rival} comes first and names only a part of its axes, so "
                "whatever beats that beats this"
            )
            return Lint(WARNING, "shadowed", numbers, text)
    return None


def _unbeaten(row: Row, rivals: Sequence[Row], alive: Sequence[Row]) -> Row | None:
    """Return the first rival that no collision takes out of the way of `row`."""
    own = set(row.mesh_axes)
    return next((rival for rival in rivals if not _can_lose(rival, own, alive)), None)


def _unreachable(row: Row, rival: Row) -> Lint:
    text = (
        f"{row} can never win: it would need {rival} to lose {_spared(row, rival)} alone, and no "
        "row above takes that and leaves the rest; move the rows of the other dims above"
    )
    return Lint(WARNING, "unreachable", (row.number, rival.number), text)


def _by_size(row: Row, rival: Row) -> Lint:
    text = (
        f"{row} serves only where {rival} does not divide the dim: no row above takes "
        f"{_spared(row, rival)} and leaves the rest"
    )
    return Lint(NOTE, "by-size", (row.number, rival.number), text)


def _spared(row: Row, rival: Row) -> str:
    return ", ".join(axis for axis in rival.mesh_axes if axis not in row.mesh_axes)


def _can_lose(rival: Row, spared: set[str], alive: Sequence[Row]) -> bool:
    """Return whether an earlier rule can beat `rival` and leave the axes `spared` free."""
    contested = set(rival.mesh_axes) - spared
    return any(
        other.number < rival.number
        and other.logical_axis != rival.logical_axis
        and contested & set(other.mesh_axes)
        and not spared & set(other.mesh_axes)
        for other in alive
    )


def missing_rows(arrays: Iterable[AnnotatedArray], rows: Sequence[Row]) -> dict[str, list[str]]:
    """Find logical axes of a model that a table has no rule for, with the arrays that have them."""
    known = {row.logical_axis for row in rows}
    missing: dict[str, list[str]] = {}
    for array in arrays:
        for axis in array.logical_axes:
            if axis is not None and axis not in known:
                missing.setdefault(axis, []).append(array.name)
    return missing


def lint_model(
    arrays: Sequence[AnnotatedArray], rows: Sequence[Row], *, is_maxtexts: bool = False
) -> list[Lint]:
    """Find what a table lacks for a model, and how much of it the model has no use for."""
    found = []
    missing = missing_rows(arrays, rows)
    if missing and is_maxtexts:
        found += _unsharded(list(missing))
        missing = {}
    for axis, names in missing.items():
        text = (
            f"no row for '{axis}' ({brief_names(names)}): Flax leaves the dim unsharded without a "
            f"word, training here refuses it; add ['{axis}', []] or name mesh axes"
        )
        found.append(Lint(WARNING, "no-row", (), text))
    used = {axis for array in arrays for axis in array.logical_axes}
    idle = [row for row in rows if row.logical_axis not in used]
    if idle:
        text = f"{len(idle)} of {len(rows)} rows are of logical axes that this model does not have"
        found.append(Lint(NOTE, "idle", tuple(row.number for row in idle), text))
    return found


def _unsharded(missing: Sequence[str]) -> list[Lint]:
    """Describe what a MaxText table leaves unsharded because it has no rule for it."""
    flag = "activation_batch_no_exp"
    found = []
    if others := [axis for axis in missing if axis != flag]:
        text = f"no row for {', '.join(others)}: not sharded, as in MaxText"
        found.append(Lint(NOTE, "no-row", (), text))
    if flag in missing:
        text = (
            f"no row for {flag}, here left unsharded: where its flag is on, MaxText takes the "
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
