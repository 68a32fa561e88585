"""Explain where every array of a model is placed on a mesh, by which rule, and which rules lost.

The input is what was recorded while the step was traced; nothing is compiled, no device is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import AbstractMesh, PartitionSpec

from moe_shard.config.mesh_config import expert_rule
from moe_shard.sharding.annotate import AnnotatedArray, Sharding
from moe_shard.sharding.explain.collisions import (
    Collision,
    find_alternatives,
    find_collisions,
    find_passed_over,
    find_uneven,
)
from moe_shard.sharding.explain.lint import (
    ERROR,
    Lint,
    lint_model,
    lint_rules,
    missing_rules,
    number_rules,
)
from moe_shard.sharding.explain.placed import PlacedArray
from moe_shard.sharding.rules import NumberedRule, RuleTable

Rules = Sequence[tuple[str, Sequence[str]]]


class Recorder(Sharding):
    """Record the arrays that a model places, without placing any.

    This is for tables that may not fit the model: nothing in them can stop the trace.

    Args:
        mesh: the mesh that the table is for.
        rules: the table, of axes of that mesh only.
    """

    def __init__(self, mesh: AbstractMesh, rules: Rules) -> None:
        super().__init__(mesh, RuleTable(rules))

    def spec(self, *_: object) -> PartitionSpec:
        """Leave every array whole."""
        return PartitionSpec()

    def _resolve(self, *_: object) -> PartitionSpec:
        return PartitionSpec()


@dataclass(frozen=True)
class Explanation:
    """Hold the explanation of one model, mesh and table.

    Attributes:
        model: the model's name.
        table: the source of the rules.
        sizes: mesh axis -> size.
        rules: the rules of the table, as written.
        parameters: the placed parameters, sorted by name.
        activations: the placed activations, in the order in which the step makes them.
        conflicts: dims that stay unsharded although the table wanted them sharded.
        lint: what is wrong with the table itself.
        notes: lines on what was assumed.
        state_bytes: bytes per device of parameters, moments and step; None where not requested.
    """

    model: str
    table: str
    sizes: Mapping[str, int]
    rules: tuple[NumberedRule, ...]
    parameters: tuple[PlacedArray, ...]
    activations: tuple[PlacedArray, ...]
    conflicts: tuple[Collision, ...]
    lint: tuple[Lint, ...]
    notes: tuple[str, ...] = ()
    state_bytes: int | None = None

    @property
    def expert_rule(self) -> str:
        """Return the logical axis whose first rule names the expert axes."""
        return expert_rule(rule.logical_axis for rule in self.rules)

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Return the mesh axes larger than 1 that split the experts while they compute."""
        name = self.expert_rule
        axes = next((each.mesh_axes for each in self.rules if each.logical_axis == name), ())
        return tuple(axis for axis in axes if self.sizes.get(axis, 1) > 1)

    @property
    def is_strict(self) -> bool:
        """Return whether these settings have no conflict and the table has no error."""
        return all(c.only_if for c in self.conflicts) and all(
            lint.level != ERROR for lint in self.lint
        )

    def to_json(self) -> dict[str, Any]:
        """Return the object of `moe-shard explain --json`."""
        placed = (*self.parameters, *self.activations)
        return {
            "model": self.model,
            "table": self.table,
            "mesh": dict(self.sizes),
            "num_devices": math.prod(self.sizes.values()),
            "expert_axes": list(self.expert_axes),
            "parameters": [array.to_json() for array in self.parameters],
            "activations": [array.to_json() for array in self.activations],
            "conflicts": [conflict.to_json() for conflict in self.conflicts],
            "lint": [lint.to_json() for lint in self.lint],
            "notes": list(self.notes),
            "totals": {
                "parameters": sum(math.prod(p.array.shape) for p in self.parameters),
                "parameter_bytes": sum(p.bytes for p in self.parameters),
                "parameter_bytes_per_device": sum(p.bytes_per_device for p in self.parameters),
                "state_bytes_per_device": self.state_bytes,
                "arrays": len(placed),
            },
        }


def explain(
    *,
    model: str,
    table: str,
    rules: Rules,
    mesh_axes: Sequence[str],
    sizes: Mapping[str, int],
    arrays: Iterable[AnnotatedArray],
    parameters: Iterable[str],
    sizes_are_assumed: bool = False,
    notes: Sequence[str] = (),
    state_bytes: int | None = None,
    is_maxtexts: bool = False,
) -> Explanation:
    """Resolve every array by a table and report what is wrong with the table.

    Args:
        model: the model's name.
        table: the name of the table.
        rules: rules of the table, as they were written.
        mesh_axes: the axes that the rules may name.
        sizes: the size of each of them.
        arrays: what was recorded while the step was traced.
        parameters: names of the recorded arrays that are parameters.
        sizes_are_assumed: whether the sizes of the mesh are assumed; rules are then applied as Flax
            does, whatever they divide, and a dim that the mesh does not divide is a warning.
        notes: see `Explanation`.
        state_bytes: see `Explanation`.
        is_maxtexts: whether the table is one of MaxText's, where mesh axes that do not exist are
            ignored.

    Raises:
        UserError: a dim that its mesh axes do not divide, unless the sizes are assumed.
    """
    numbered, arrays = number_rules(rules), list(arrays)
    usable, lint = (
        usable_rules(rules, mesh_axes, arrays),
        lint_rules(numbered, mesh_axes, by_flax=sizes_are_assumed, is_maxtexts=is_maxtexts),
    )
    resolver = RuleTable(usable).on(sizes)
    placed = [
        PlacedArray(
            array,
            resolver.resolve(
                array.name, array.logical_axes, array.shape, must_divide=not sizes_are_assumed
            ),
            sizes,
            len(numbered),
        )
        for array in arrays
    ]
    lint += lint_model(arrays, numbered, is_maxtexts=is_maxtexts)
    lint += find_uneven(placed)
    lint += find_alternatives(placed)
    lint += find_passed_over(placed)
    names = set(parameters)
    return Explanation(
        model=model,
        table=table,
        sizes=dict(sizes),
        rules=numbered,
        parameters=tuple(p for p in placed if p.array.name in names),
        activations=tuple(p for p in placed if p.array.name not in names),
        conflicts=tuple(find_collisions(placed, numbered)),
        lint=tuple(lint),
        notes=tuple(notes),
        state_bytes=state_bytes,
    )


def usable_rules(
    rules: Rules, mesh_axes: Sequence[str], arrays: Iterable[AnnotatedArray] = ()
) -> list[tuple[str, tuple[str, ...]]]:
    """Return a table that can be resolved: known axes, each once, every logical axis with a rule.

    The rules keep their numbers; missing ones are added at the end, as Flax would treat them.
    """
    kept = [
        (name, tuple(dict.fromkeys(axis for axis in axes if axis in mesh_axes)))
        for name, axes in rules
    ]
    return kept + [(axis, ()) for axis in missing_rules(arrays, number_rules(rules))]
