"""Map logical axes to mesh axes by a rule table, and record every decision.

A table is a list of rules `(logical axis, mesh axes)`. Resolving an array walks the rules from the
first to the last, as Flax's resolver does: a rule applies to the dim that has its logical axis if
that dim has no placement yet and none of the rule's mesh axes is already taken by another dim of
the same array. A later rule of the same logical axis is therefore an alternative for when an
earlier one collides. Unlike in Flax's resolver nothing is dropped silently: each rule that lost is
recorded with the dim that beat it.

A rule whose mesh axes do not divide the dim is passed over for a later rule of its logical axis,
like one that collides, and is recorded too; if no later rule divides it, that is an error. So
`[exp, [expert, fsdp]]` above `[exp, [expert]]` means: over both axes where both divide the experts.
Where every rule divides its dim, placements equal those of Flax, which ignores sizes.

Mesh axes of size 1 shard nothing and are ignored, so a collision over one is no collision, and a
program does not depend on rules that cannot matter.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import PartitionSpec

from moe_shard.config.default_rules import DEFAULT_RULES
from moe_shard.config.mesh_config import Rule, expert_rule
from moe_shard.errors import UserError

LogicalAxes = Sequence[str | None]
"""One logical axis per dim of an array; None for a dim that is never sharded."""


@dataclass(frozen=True)
class NumberedRule:
    """Hold one rule and its number in the table, counted from 1."""

    number: int
    logical_axis: str
    mesh_axes: tuple[str, ...]

    def __str__(self) -> str:
        return f"rule {self.number} ['{self.logical_axis}', [{', '.join(self.mesh_axes)}]]"


@dataclass(frozen=True)
class Loss:
    """Describe a rule that could not be used for a dim.

    Attributes:
        rule: the rule.
        mesh_axes: those of its mesh axes that are larger than 1.
        held_by: the dim that already had one of them; empty where they do not divide the dim.
        size: the dim's size.
        taken: those of `mesh_axes` that other dims already had; empty where they do not divide.
    """

    rule: NumberedRule
    mesh_axes: tuple[str, ...]
    held_by: str
    size: int
    taken: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Return a word for scripts: "taken" by another dim, or "does not divide"."""
        return "taken" if self.held_by else "does not divide"

    def __str__(self) -> str:
        if self.held_by:
            return f"{self.rule} lost {', '.join(self.taken)} to '{self.held_by}'"
        return f"{self.rule} does not divide {self.size}"


@dataclass(frozen=True)
class Decision:
    """Describe how one dim of an array was placed.

    Attributes:
        logical_axis: the dim's name, or None for a dim that is never sharded.
        size: the dim's size.
        mesh_axes: the mesh axes (all larger than 1) it is sharded over; empty if unsharded.
        won: the rule that placed it, or None where no rule could.
        lost: the rules that were tried before, each with the reason why it could not be used.
    """

    logical_axis: str | None
    size: int
    mesh_axes: tuple[str, ...]
    won: NumberedRule | None
    lost: tuple[Loss, ...]

    @property
    def is_conflict(self) -> bool:
        """Return whether rules would shard this dim and every one of them lost to other dims."""
        return self.won is None and bool(self.lost) and all(loss.held_by for loss in self.lost)


@dataclass(frozen=True)
class Resolution:
    """Hold the placement of one array: a decision per dim."""

    name: str
    decisions: tuple[Decision, ...]

    @property
    def spec(self) -> PartitionSpec:
        """Return the decisions as a PartitionSpec."""
        entries = [d.mesh_axes if len(d.mesh_axes) != 1 else d.mesh_axes[0] for d in self.decisions]
        return PartitionSpec(*(entry or None for entry in entries))

    @property
    def conflicts(self) -> tuple[Decision, ...]:
        """Return the dims left unsharded although the table would shard them."""
        return tuple(d for d in self.decisions if d.is_conflict)


class RuleTable:
    """Map logical axes to mesh axes by rules. A table has no mesh; a `Sharding` has one.

    >>> import moe_shard as ms
    >>> table = ms.RuleTable.default()
    >>> table.rules[0]
    ('activation_batch', ('data', 'fsdp', 'fsdp_transpose', 'expert'))
    >>> mine = ms.RuleTable([*table.rules, ("pixels", ("data", "fsdp")), ("channels", ())])
    >>> len(mine.rules) - len(table.rules)
    2

    Args:
        rules: pairs of a logical axis and the mesh axes that its dim is sharded over (one name,
            several, or none), in order of precedence. Later rules of one logical axis are
            alternatives for where an earlier one collides or does not divide.

    Raises:
        UserError: a rule of another form, or one that names a mesh axis twice.
    """

    def __init__(self, rules: Iterable[tuple[str, str | Sequence[str] | None]]) -> None:
        self.rules: tuple[Rule, ...] = tuple(_checked(rule) for rule in rules)
        self._hash = hash(self.rules)

    @classmethod
    def default(cls) -> RuleTable:
        """Return the table of `configs/base.yml`, which names the axes of `make_mesh`.

        >>> import moe_shard as ms
        >>> ("activation_exp", ("expert",)) in ms.RuleTable.default().rules
        True
        """
        return cls(DEFAULT_RULES)

    @classmethod
    def from_yaml(cls, path: str | Path) -> RuleTable:
        """Read `logical_axis_rules` of a YAML file, in the format of MaxText's rule files.

        >>> import moe_shard as ms, pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "rules.yml"
        >>> _ = file.write_text("logical_axis_rules: [[exp, [expert]], [embed, null]]")
        >>> ms.RuleTable.from_yaml(file).rules
        (('exp', ('expert',)), ('embed', ()))

        A table that was written for MaxText is completed to mean what it means there: logical axes
        without a rule are not sharded, and mesh axes that only MaxText has count as size 1. What
        was changed is in a warning (`UserWarning`).

        Raises:
            UserError: the file cannot be read, or has no rules of this form.
        """
        # Imported only here: MaxText's keys come with the reader of whole configurations.
        from moe_shard.config.load import maxtext_keys
        from moe_shard.config.tables import read_table

        rules, notes = read_table(Path(path), maxtext_keys(), DEFAULT_RULES)
        for note in notes:
            warnings.warn(note, UserWarning, stacklevel=2)
        return cls(rules)

    def on(self, axis_sizes: Mapping[str, int]) -> BoundTable:
        """Bind the table to the axes of a mesh.

        Args:
            axis_sizes: mesh axis to size.

        Raises:
            UserError: a rule names a mesh axis that is not there.
        """
        return BoundTable(self, axis_sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RuleTable) and self.rules == other.rules

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"RuleTable({len(self.rules)} rules)"


def _checked(rule: tuple[str, str | Sequence[str] | None]) -> Rule:
    """Return a rule with its mesh axes as a tuple.

    Raises:
        UserError: it has another form.
    """
    pair = tuple(rule) if isinstance(rule, Sequence) and not isinstance(rule, str) else ()
    name, axes = pair if len(pair) == 2 else (None, None)
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    parts = [name, *axes] if isinstance(axes, Sequence) else [None]
    if not all(isinstance(part, str) and part for part in parts):
        raise UserError(
            f"RuleTable: {rule!r} is not (logical axis, mesh axes)\n"
            "fix: for example ('exp', ('expert',))"
        )
    if len(set(axes)) < len(axes):
        raise UserError(f"RuleTable: {rule!r} names a mesh axis twice\nfix: name it once")
    return str(name), tuple(axes)


class BoundTable:
    """Resolve arrays by a rule table on the axes of one mesh.

    Args:
        table: the rules.
        axis_sizes: mesh axis to size.

    Raises:
        UserError: a rule names a mesh axis that the mesh does not have.
    """

    def __init__(self, table: RuleTable, axis_sizes: Mapping[str, int]) -> None:
        self.axis_sizes = dict(axis_sizes)
        self.rules = tuple(
            NumberedRule(number, logical, axes)
            for number, (logical, axes) in enumerate(table.rules, 1)
        )
        for rule in self.rules:
            for axis in rule.mesh_axes:
                if axis not in self.axis_sizes:
                    raise UserError(
                        f"logical_axis_rules: {rule} names the mesh axis '{axis}'\n"
                        f"the mesh has {', '.join(self.axis_sizes)}\n"
                        "fix: remove the axis from the rule, or give the mesh such an axis"
                    )
        self._names = {rule.logical_axis for rule in self.rules}

    def sharding_axes(self, logical_axis: str) -> tuple[str, ...]:
        """Return the mesh axes larger than 1 in the first rule of a logical axis, if any."""
        for rule in self.rules:
            if rule.logical_axis == logical_axis:
                return self._sharding_axes(rule)
        return ()

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Return the mesh axes larger than 1 that split the experts while they compute."""
        return self.sharding_axes(expert_rule(self._names))

    @property
    def named_expert_axes(self) -> tuple[str, ...]:
        """Return the mesh axes that are for experts, whatever their sizes."""
        wanted = expert_rule(self._names)
        return next((rule.mesh_axes for rule in self.rules if rule.logical_axis == wanted), ())

    def resolve(
        self,
        name: str,
        logical_axes: LogicalAxes,
        shape: Sequence[int],
        *,
        must_divide: bool = True,
    ) -> Resolution:
        """Place one array.

        Args:
            name: the array's name in messages.
            logical_axes: one logical axis, or None, per dim.
            shape: the dims' sizes.
            must_divide: False where the mesh's sizes are only assumed: no rule is then passed over
                because of a size, and no size is an error.

        Raises:
            UserError: a logical axis without a rule, the same logical axis on two dims, or a dim
                that the mesh axes of no rule divide.
        """
        assert len(logical_axes) == len(shape), (name, logical_axes, shape)
        self._check_names(name, logical_axes)
        size_of = {axis: size for axis, size in zip(logical_axes, shape, strict=True) if axis}
        holder: dict[str, str] = {}
        won: dict[str, NumberedRule] = {}
        lost: dict[str, list[Loss]] = {axis: [] for axis in logical_axes if axis}
        for rule in self.rules:
            if rule.logical_axis not in lost or rule.logical_axis in won:
                continue
            wanted = self._sharding_axes(rule)
            taken = tuple(axis for axis in wanted if axis in holder)
            size = size_of[rule.logical_axis]
            if taken:
                lost[rule.logical_axis].append(Loss(rule, wanted, holder[taken[0]], size, taken))
            elif must_divide and size % self._parts(wanted):
                lost[rule.logical_axis].append(Loss(rule, wanted, "", size, ()))
            else:
                won[rule.logical_axis] = rule
                holder.update(dict.fromkeys(wanted, rule.logical_axis))
        decisions = []
        for axis, size in zip(logical_axes, shape, strict=True):
            if axis is None:
                decisions.append(Decision(None, size, (), None, ()))
                continue
            rule_won = won.get(axis)
            mesh_axes = self._sharding_axes(rule_won) if rule_won else ()
            if rule_won is None and not all(loss.held_by for loss in lost[axis]):
                raise self._indivisible(name, axis, size, lost[axis])
            decisions.append(Decision(axis, size, mesh_axes, rule_won, tuple(lost[axis])))
        return Resolution(name, tuple(decisions))

    def _sharding_axes(self, rule: NumberedRule) -> tuple[str, ...]:
        return tuple(axis for axis in rule.mesh_axes if self.axis_sizes[axis] > 1)

    def _parts(self, mesh_axes: Sequence[str]) -> int:
        return math.prod(self.axis_sizes[axis] for axis in mesh_axes)

    def _check_names(self, name: str, logical_axes: LogicalAxes) -> None:
        named = [axis for axis in logical_axes if axis is not None]
        for axis in named:
            if axis not in self._names:
                raise UserError(
                    f"logical_axis_rules: no rule for the logical axis '{axis}' of {name}\n"
                    f"fix: add ['{axis}', []] to leave that dim unsharded, or name mesh axes for it"
                    f"{self._near(axis)}"
                )
            if named.count(axis) > 1:
                raise UserError(
                    f"{name}: the logical axis '{axis}' stands on two of its dims\n"
                    "give the dims different logical axes: two dims cannot share mesh axes"
                )

    def _near(self, axis: str) -> str:
        near = difflib.get_close_matches(axis, sorted(self._names), n=1)
        return f"; or did you mean '{near[0]}'?" if near else ""

    def _indivisible(self, name: str, axis: str, size: int, lost: Sequence[Loss]) -> UserError:
        def product(loss: Loss) -> str:
            sizes = " * ".join(f"{a}={self.axis_sizes[a]}" for a in loss.mesh_axes)
            return f"{sizes} = {self._parts(loss.mesh_axes)}"

        if len(lost) == 1:
            return UserError(
                f"{name}: its dim '{axis}' of size {size} is not divisible by {product(lost[0])}\n"
                f"placed by {lost[0].rule} of logical_axis_rules\n"
                f"change the size or the parallelism of these axes, or use ['{axis}', []]"
            )
        rules = [str(loss) if loss.held_by else f"{loss.rule} by {product(loss)}" for loss in lost]
        return UserError(
            f"{name}: its dim '{axis}' of size {size} is not divisible as any rule asks\n"
            f"logical_axis_rules: {'; '.join(rules)}\n"
            f"change the size or the parallelism of these axes, or add ['{axis}', []] as last rule"
        )
