"""The rule table: logical axis names to mesh axes, with every decision on record.

A table is a list of rows `[logical axis, mesh axes]`. Resolving an array walks the rows from the
first to the last, as Flax's resolver does: a row applies to the dim that bears its logical axis if
that dim has no placement yet and none of the row's mesh axes is already taken by another dim of
the same array. A later row of the same logical axis is therefore an alternative for when an
earlier one collides. Unlike Flax's resolver nothing is dropped in silence: each row that lost is
recorded with the dim that beat it.

A row whose mesh axes do not divide the dim is passed over for a later row of its logical axis, as
one that collides is, and recorded likewise; where no later row serves it is an error. So `[exp,
[expert, fsdp]]` above `[exp, [expert]]` says: over both where both divide the experts. Where every
row divides, placements are Flax's, which knows no sizes.

Mesh axes of size 1 shard nothing and are ignored, so a collision over one is no collision, and a
program does not depend on rows that cannot matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from moe_shard.config.mesh_config import expert_row
from moe_shard.errors import UserError

LogicalAxes = Sequence[str | None]
"""One logical axis name per dim of an array; None for a dim that is never sharded."""


@dataclass(frozen=True)
class Row:
    """One row of a rule table: its position, counted from 1, and its content."""

    number: int
    logical_axis: str
    mesh_axes: tuple[str, ...]

    def __str__(self) -> str:
        return f"row {self.number} ['{self.logical_axis}', [{', '.join(self.mesh_axes)}]]"


@dataclass(frozen=True)
class Loss:
    """A row that could not be used for a dim.

    Attributes:
        row: the row.
        mesh_axes: those of its mesh axes that are larger than 1.
        held_by: the dim that already had one of them; empty where they do not divide the dim.
        size: the dim's size.
    """

    row: Row
    mesh_axes: tuple[str, ...]
    held_by: str
    size: int

    @property
    def reason(self) -> str:
        """For scripts: "taken" by another dim, or "does not divide"."""
        return "taken" if self.held_by else "does not divide"

    def __str__(self) -> str:
        if self.held_by:
            return f"{self.row} lost {', '.join(self.mesh_axes)} to '{self.held_by}'"
        return f"{self.row} does not divide {self.size}"


@dataclass(frozen=True)
class Decision:
    """How one dim of an array was placed.

    Attributes:
        logical_axis: the dim's name, or None for a dim that is never sharded.
        size: the dim's size.
        mesh_axes: the mesh axes (all larger than 1) it is sharded over; empty if unsharded.
        won: the row that placed it, or None where no row could.
        lost: the rows that were tried before, each with what kept it from serving.
    """

    logical_axis: str | None
    size: int
    mesh_axes: tuple[str, ...]
    won: Row | None
    lost: tuple[Loss, ...]

    @property
    def is_conflict(self) -> bool:
        """True where rows wanted to shard this dim and every one of them lost to other dims."""
        return self.won is None and bool(self.lost) and all(loss.held_by for loss in self.lost)


@dataclass(frozen=True)
class Resolution:
    """The placement of one array: a decision per dim."""

    name: str
    decisions: tuple[Decision, ...]

    @property
    def spec(self) -> PartitionSpec:
        """The decisions as JAX spells them."""
        entries = [d.mesh_axes if len(d.mesh_axes) != 1 else d.mesh_axes[0] for d in self.decisions]
        return PartitionSpec(*(entry or None for entry in entries))

    @property
    def conflicts(self) -> tuple[Decision, ...]:
        """The dims left unsharded although the table wanted them sharded."""
        return tuple(d for d in self.decisions if d.is_conflict)


class RuleTable:
    """A rule table over the axes of one mesh.

    Args:
        rows: pairs of a logical axis and the mesh axes that its dim is sharded over, in order of
            precedence.
        axis_sizes: the mesh, as ordered axis sizes.

    Raises:
        UserError: a row names a mesh axis that the mesh does not have.
    """

    def __init__(
        self, rows: Sequence[tuple[str, Sequence[str]]], axis_sizes: Mapping[str, int]
    ) -> None:
        self.axis_sizes = dict(axis_sizes)
        self.rows = tuple(
            Row(number, logical, tuple(axes)) for number, (logical, axes) in enumerate(rows, 1)
        )
        for row in self.rows:
            for axis in row.mesh_axes:
                if axis not in self.axis_sizes:
                    raise UserError(
                        f"logical_axis_rules: {row} names the mesh axis '{axis}'\n"
                        f"the mesh has {', '.join(self.axis_sizes)}\n"
                        "remove the axis from the row, or add it to mesh_axes"
                    )
        self._names = {row.logical_axis for row in self.rows}

    def sharding_axes(self, logical_axis: str) -> tuple[str, ...]:
        """Mesh axes larger than 1 in the first row of a logical axis; empty if it has none."""
        for row in self.rows:
            if row.logical_axis == logical_axis:
                return self._sharding_axes(row)
        return ()

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """The mesh axes larger than 1 that split the experts while they compute."""
        return self.sharding_axes(expert_row(self._names))

    @property
    def named_expert_axes(self) -> tuple[str, ...]:
        """The mesh axes that are for experts, whatever their sizes."""
        wanted = expert_row(self._names)
        return next((row.mesh_axes for row in self.rows if row.logical_axis == wanted), ())

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
            name: what messages call the array.
            logical_axes: one name, or None, per dim.
            shape: the dims' sizes.
            must_divide: False where the mesh's sizes are only assumed: no row is then passed over
                for them, and none is an error.

        Raises:
            UserError: a logical axis without a row, the same logical axis on two dims, or a dim
                that the mesh axes of no row divide.
        """
        assert len(logical_axes) == len(shape), (name, logical_axes, shape)
        self._check_names(name, logical_axes)
        size_of = {axis: size for axis, size in zip(logical_axes, shape, strict=True) if axis}
        holder: dict[str, str] = {}
        won: dict[str, Row] = {}
        lost: dict[str, list[Loss]] = {axis: [] for axis in logical_axes if axis}
        for row in self.rows:
            if row.logical_axis not in lost or row.logical_axis in won:
                continue
            wanted = self._sharding_axes(row)
            taken = next((axis for axis in wanted if axis in holder), None)
            size = size_of[row.logical_axis]
            if taken is not None:
                lost[row.logical_axis].append(Loss(row, wanted, holder[taken], size))
            elif must_divide and size % self._parts(wanted):
                lost[row.logical_axis].append(Loss(row, wanted, "", size))
            else:
                won[row.logical_axis] = row
                holder.update(dict.fromkeys(wanted, row.logical_axis))
        decisions = []
        for axis, size in zip(logical_axes, shape, strict=True):
            if axis is None:
                decisions.append(Decision(None, size, (), None, ()))
                continue
            row_won = won.get(axis)
            mesh_axes = self._sharding_axes(row_won) if row_won else ()
            if row_won is None and not all(loss.held_by for loss in lost[axis]):
                raise self._indivisible(name, axis, size, lost[axis])
            decisions.append(Decision(axis, size, mesh_axes, row_won, tuple(lost[axis])))
        return Resolution(name, tuple(decisions))

    def _sharding_axes(self, row: Row) -> tuple[str, ...]:
        return tuple(axis for axis in row.mesh_axes if self.axis_sizes[axis] > 1)

    def _parts(self, mesh_axes: Sequence[str]) -> int:
        return math.prod(self.axis_sizes[axis] for axis in mesh_axes)

    def _check_names(self, name: str, logical_axes: LogicalAxes) -> None:
        named = [axis for axis in logical_axes if axis is not None]
        for axis in named:
            if axis not in self._names:
                raise UserError(
                    f"logical_axis_rules: no row for the logical axis '{axis}' of {name}\n"
                    f"add ['{axis}', []] to leave that dim unsharded, or name mesh axes for it"
                )
            if named.count(axis) > 1:
                raise UserError(
                    f"{name}: the logical axis '{axis}' stands on two of its dims\n"
                    "give the dims different logical axes: two dims cannot share mesh axes"
                )

    def _indivisible(self, name: str, axis: str, size: int, lost: Sequence[Loss]) -> UserError:
        def product(loss: Loss) -> str:
            sizes = " * ".join(f"{a}={self.axis_sizes[a]}" for a in loss.mesh_axes)
            return f"{sizes} = {self._parts(loss.mesh_axes)}"

        if len(lost) == 1:
            return UserError(
                f"{name}: its dim '{axis}' of size {size} is not divisible by {product(lost[0])}\n"
                f"placed by {lost[0].row} of logical_axis_rules\n"
                f"change the size or the parallelism of these axes, or use ['{axis}', []]"
            )
        rows = [str(loss) if loss.held_by else f"{loss.row} by {product(loss)}" for loss in lost]
        return UserError(
            f"{name}: its dim '{axis}' of size {size} is not divisible as any row asks\n"
            f"logical_axis_rules: {'; '.join(rows)}\n"
            f"change the size or the parallelism of these axes, or add ['{axis}', []] as last row"
        )
