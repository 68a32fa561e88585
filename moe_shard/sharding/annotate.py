"""The one object through which layers place arrays: made once from a mesh and a rule table.

Layers speak of logical axes; only the table knows the mesh. What was decided for each array is
kept, so that a report can be written once a program has been traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from moe_shard.errors import UserError
from moe_shard.sharding.rules import LogicalAxes, Resolution, RuleTable


@dataclass(frozen=True)
class Conflict:
    """A dim that the table wanted sharded and that stays unsharded.

    Attributes:
        array: the array's name.
        dim: the logical axis of the dim.
        cause: which row lost which mesh axes to which other dim.
        consequence: what that means, and the cure if there is one; may be empty.
    """

    array: str
    dim: str
    cause: str
    consequence: str

    def __str__(self) -> str:
        text = f"{self.array}: dim '{self.dim}' stays unsharded: {self.cause}"
        return f"{text}; {self.consequence}" if self.consequence else text


class Annotator:
    """Constrains arrays by logical axis names and records every decision.

    Args:
        mesh: the device mesh.
        rows: the rule table.
        on_conflict: "warn" records a conflict; "error" raises it.

    Raises:
        UserError: the table names a mesh axis that the mesh does not have.
    """

    def __init__(
        self, mesh: Mesh, rows: Sequence[tuple[str, Sequence[str]]], on_conflict: str = "warn"
    ) -> None:
        self.mesh = mesh
        self.table = RuleTable(rows, dict(mesh.shape))
        self.on_conflict = on_conflict
        self.resolutions: dict[str, Resolution] = {}
        self.conflicts: dict[tuple[str, str], Conflict] = {}

    def __call__(
        self, x: Array, *logical_axes: str | None, name: str, consequence: str = ""
    ) -> Array:
        """Constrain `x` to the placement of its logical axes.

        Args:
            x: an array with as many dims as logical axes are given.
            logical_axes: a name per dim, or None for a dim that is never sharded.
            name: what reports call the array.
            consequence: what it means, and the cure, if one of the dims cannot be sharded.

        Raises:
            UserError: see `RuleTable.resolve`; or a conflict where `on_conflict` is "error".
        """
        sharding = self.sharding(name, logical_axes, x.shape, consequence=consequence)
        return jax.lax.with_sharding_constraint(x, sharding)

    def sharding(
        self, name: str, logical_axes: LogicalAxes, shape: Sequence[int], *, consequence: str = ""
    ) -> NamedSharding:
        """The sharding of an array of this shape; for what is not yet there, such as parameters."""
        resolution = self.table.resolve(name, logical_axes, shape)
        self.resolutions[name] = resolution
        for decision in resolution.conflicts:
            loss = decision.lost[0]
            cause = f"{loss.row} lost {', '.join(loss.mesh_axes)} to '{loss.held_by}'"
            conflict = Conflict(name, decision.logical_axis or "", cause, consequence)
            if self.on_conflict == "error":
                raise UserError(f"rule_conflicts=error: {conflict}")
            self.conflicts[name, conflict.dim] = conflict
        return NamedSharding(self.mesh, resolution.spec)

    def conflict_lines(self) -> list[str]:
        """The conflicts, a line for all arrays that share cause and consequence."""
        arrays: dict[Conflict, list[str]] = {}
        for conflict in self.conflicts.values():
            arrays.setdefault(replace(conflict, array=""), []).append(conflict.array)
        return [str(replace(key, array=", ".join(names))) for key, names in arrays.items()]
