"""Configure the mesh: axes, sizes on both levels, and the rule table. Plain arithmetic, no jax.

ICI is the network inside a slice (or node group), DCN the one between slices. Every axis has a
size on each level; the size of a mesh axis is the product of the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Annotated

from moe_shard.config.default_rules import DEFAULT_RULES
from moe_shard.config.keys import Key, check_leaves
from moe_shard.errors import UserError
from moe_shard.units import human_count

MESH_AXES: tuple[str, ...] = ("data", "fsdp", "fsdp_transpose", "tensor", "context", "expert")
LEVELS = ("ici", "dcn")
RULE_CONFLICTS = ("warn", "error")

EXPERT_RULES = ("activation_exp", "exp")
"""Logical axes of the expert dim where experts compute, and where their weights are stored."""

Rule = tuple[str, tuple[str, ...]]


def expert_rule(logical_axes: Iterable[str]) -> str:
    """Return the logical axis whose first rule names the axes that split computing experts.

    Weights may be stored over more axes than these (FSDP over the experts dim), so the rule of the
    activations decides; that of the weights is used only in a table that has no such rule.

    Args:
        logical_axes: the logical axes that a table has rules for.
    """
    known = set(logical_axes)
    return next((name for name in EXPERT_RULES if name in known), EXPERT_RULES[0])


def parallelism_key(level: str, axis: str) -> str:
    """Return the YAML key of one axis on one level, such as `ici_expert_parallelism`."""
    return f"{level}_{axis}_parallelism"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Describe the mesh: its axes, their sizes, and the rule table.

    Attributes:
        mesh_axes: mesh axes in order, slowest first; always all of `MESH_AXES`.
        ici: size of each axis inside a slice, in the order of `mesh_axes`; at most one is -1 (what
            the others leave).
        dcn: size of each axis across slices, in the order of `mesh_axes`; at most one is -1.
        logical_axis_rules: rules (logical axis, mesh axes); several rules of one logical axis are
            alternatives.
        rule_conflicts: "warn" or "error": what happens where two dims of a tensor want the same
            mesh axis.
        num_simulated_devices: CPU devices to simulate where there is no accelerator.

    Raises:
        UserError: a size out of range, two sizes of -1 on one level, or a rule that names a mesh
            axis that does not exist or the same one twice.
    """

    mesh_axes: Annotated[tuple[str, ...], Key()] = (
        "data",
        "fsdp",
        "fsdp_transpose",
        "tensor",
        "context",
        "expert",
    )
    ici: tuple[int, ...] = (1, -1, 1, 1, 1, 1)
    dcn: tuple[int, ...] = (-1, 1, 1, 1, 1, 1)
    logical_axis_rules: Annotated[tuple[Rule, ...], Key()] = DEFAULT_RULES
    rule_conflicts: Annotated[str, Key(choices=RULE_CONFLICTS)] = "warn"
    num_simulated_devices: Annotated[int, Key(least=1, most=2**16)] = 8

    def __post_init__(self) -> None:
        check_leaves(self)
        for level in LEVELS:
            self._check_sizes(level)
        for name, axes in self.logical_axis_rules:
            rule = f"[{name}, [{', '.join(axes)}]]"
            for axis in axes:
                if axis not in self.mesh_axes:
                    raise UserError(
                        f"rule {rule} of logical_axis_rules names the mesh axis {axis!r}, "
                        "which does not exist\n"
                        f"fix: one of {', '.join(self.mesh_axes)}"
                    )
            if len(set(axes)) < len(axes):
                raise UserError(
                    f"rule {rule} of logical_axis_rules names a mesh axis twice\nfix: name it once"
                )

    def _check_sizes(self, level: str) -> None:
        sizes = self.level_sizes(level)
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(
                    f"{parallelism_key(level, axis)}={size} is out of range\n"
                    "fix: at least 1, or -1 for what the other axes leave"
                )
        free = [f"{parallelism_key(level, axis)}=-1" for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise UserError(
                f"{' and '.join(free)}: only one axis of a level can take what the others leave\n"
                f"fix: give {' or '.join(entry.removesuffix('=-1') for entry in free[:2])} a size"
            )

    def level_sizes(self, level: str) -> dict[str, int]:
        """Return {mesh axis: size as configured (-1 included)} on `ici` or `dcn`."""
        return dict(zip(self.mesh_axes, getattr(self, level), strict=True))

    def flat_sizes(self) -> dict[str, int]:
        """Return {YAML key: size} of both levels."""
        return {
            parallelism_key(level, axis): size
            for level in LEVELS
            for axis, size in self.level_sizes(level).items()
        }

    def axes_of(self, logical_axis: str) -> tuple[str, ...]:
        """Return the mesh axes in the first rule of a logical axis; empty where it has none."""
        return next((axes for name, axes in self.logical_axis_rules if name == logical_axis), ())

    @property
    def expert_rule(self) -> str:
        """Return the logical axis whose first rule names the expert axes; see `expert_rule`."""
        return expert_rule(name for name, _ in self.logical_axis_rules)

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Return the mesh axes that split the experts while they compute, whatever their sizes."""
        return self.axes_of(self.expert_rule)

    def resolve(self, num_devices: int, num_slices: int = 1) -> dict[str, int]:
        """Fill the -1s for a number of devices.

        Args:
            num_devices: devices in all slices together.
            num_slices: groups of devices joined by DCN.

        Returns:
            Mesh axis -> size, in the order of `mesh_axes`; the sizes multiply to `num_devices`.

        Raises:
            UserError: as `resolve_levels`.
        """
        ici, dcn = self.resolve_levels(num_devices, num_slices)
        return {axis: ici[axis] * dcn[axis] for axis in self.mesh_axes}

    def resolve_levels(
        self, num_devices: int, num_slices: int = 1
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Fill the -1s of each level by itself, for meshes that span slices.

        Args:
            num_devices: devices in all slices together.
            num_slices: groups of devices joined by DCN.

        Returns:
            Mesh axis -> size inside a slice, and mesh axis -> size across slices.

        Raises:
            UserError: the sizes cannot multiply to the devices (or slices) there are.
        """
        if num_slices < 1 or num_devices < 1 or num_devices % num_slices:
            raise UserError(
                f"{num_devices} devices do not split into {num_slices} equal slices\n"
                "fix: a number of devices that is a multiple of the number of slices"
            )
        per_slice = num_devices // num_slices
        devices_text = f"{per_slice} devices" + (" in a slice" if num_slices > 1 else "")
        ici = _fill("ici", self.level_sizes("ici"), per_slice, devices_text)
        dcn = _fill(
            "dcn",
            self.level_sizes("dcn"),
            num_slices,
            human_count(num_slices, "slice"),
        )
        return ici, dcn


def _fill(level: str, sizes: Mapping[str, int], total: int, what: str) -> dict[str, int]:
    """Replace the -1 of one level so that the sizes multiply to `total`."""
    fixed = math.prod(size for size in sizes.values() if size != -1)
    has_free = -1 in sizes.values()
    if fixed == total or (has_free and total % fixed == 0):
        return {axis: total // fixed if size == -1 else size for axis, size in sizes.items()}
    named = [
        f"{parallelism_key(level, axis)}={size}" for axis, size in sizes.items() if size != 1
    ] or [f"{level}_*_parallelism=1"]
    without, multiply = ("without the -1 ", "does not divide") if has_free else ("", "is not")
    raise UserError(
        f"{', '.join(named)}: {without}the axes multiply to {fixed}, which {multiply} {what}\n"
        f"fix: {_mesh_fix(level, sizes, total)}"
    )


def _mesh_fix(level: str, sizes: Mapping[str, int], total: int) -> str:
    """Return a change of one key that makes the level's product right, where there is one."""
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sorted(sizes.items(), key=lambda item: -item[1]):
        rest = fixed // size
        if size > 1 and total % rest == 0:
            room = total // rest
            if -1 in sizes.values():  # any divisor will do: the nearest below
                room = max(part for part in range(1, min(size, room) + 1) if room % part == 0)
            return f"{parallelism_key(level, axis)}={room}"
    if fixed == 1:
        return f"{parallelism_key(level, 'data' if level == 'dcn' else 'fsdp')}={total}"
    return f"{level} sizes whose product is {total}"
