"""Read rule files that were not written for this package: any mesh axes, any logical axes.

Such a table can be explained but not trained with; for that there is `custom_mesh_and_rule`, see
`tables.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_shard.config.keys import shown
from moe_shard.config.mesh_config import Rule
from moe_shard.config.strict_yaml import read_mapping
from moe_shard.config.tables import read_rules
from moe_shard.errors import UserError

ASSUMED_SIZE = 2
_SIZE_KEY = re.compile(r"(ici|dcn)_(\w+)_parallelism=(.*)", re.DOTALL)


@dataclass(frozen=True)
class ForeignTable:
    """Hold a rule table with the axes of its own mesh.

    Attributes:
        rules: the rules as written.
        mesh_axes: `mesh_axes` of the file; without it, the axes that the rules name.
        names_its_axes: whether the file has `mesh_axes`.
    """

    rules: tuple[Rule, ...]
    mesh_axes: tuple[str, ...]
    names_its_axes: bool


def read_foreign_table(path: Path) -> ForeignTable:
    """Read `mesh_axes` and `logical_axis_rules` of a YAML file; its other keys are ignored.

    Raises:
        UserError: it cannot be read, has no rules, or `mesh_axes` is no list of names, each once.
    """
    content = read_mapping(path)
    if not content.get("logical_axis_rules"):
        raise UserError(
            f"{path}: no logical_axis_rules\nfix: a file with rules such as [exp, [expert]]"
        )
    rules = tuple(read_rules(content["logical_axis_rules"], str(path)))
    axes = content.get("mesh_axes")
    if axes is None:
        named = dict.fromkeys(axis for _, rule in rules for axis in rule)
        if not named:
            raise UserError(
                f"{path}: no mesh_axes, and no rule names one\n"
                "fix: for example [data, fsdp, expert]"
            )
        return ForeignTable(rules, tuple(named), names_its_axes=False)
    axes = [axes] if isinstance(axes, str) else axes
    is_names = isinstance(axes, list) and all(isinstance(axis, str) and axis for axis in axes)
    if not axes or not is_names or len(set(axes)) < len(axes):
        raise UserError(
            f"{path}: mesh_axes={shown(axes)} is not a list of names, each once\n"
            "fix: for example [data, fsdp, expert]"
        )
    return ForeignTable(rules, tuple(axes), names_its_axes=True)


def take_sizes(
    overrides: Sequence[str], mesh_axes: Sequence[str]
) -> tuple[dict[str, int], tuple[str, ...], list[str]]:
    """Return sizes for the axes of a foreign mesh: those given, `ASSUMED_SIZE` for the others.

    Args:
        overrides: `key=value` arguments; `ici_<axis>_parallelism` and `dcn_<axis>_parallelism` are
            read from them, and the size of an axis is the product of its two.
        mesh_axes: the axes.

    Returns:
        Axis -> size, the axes whose size is assumed, and the other overrides.

    Raises:
        UserError: a size for an axis that the mesh does not have, or one that is no size.
    """
    given: dict[str, int] = {}
    others = []
    for override in overrides:
        match = _SIZE_KEY.fullmatch(override)
        if match is None:
            others.append(override)
            continue
        axis, value = match[2], match[3]
        if axis not in mesh_axes:
            raise UserError(
                f"{override}: the mesh of the rule file has no axis '{axis}'\n"
                f"fix: one of {', '.join(mesh_axes)}"
            )
        if not value.isdecimal() or not 1 <= int(value) <= 2**20:
            raise UserError(
                f"{override}: not a size\nfix: a number from 1; there are no devices to fill a -1"
            )
        given[axis] = given.get(axis, 1) * int(value)
    sizes: Mapping[str, int] = {axis: given.get(axis, ASSUMED_SIZE) for axis in mesh_axes}
    assumed = tuple(axis for axis in mesh_axes if axis not in given)
    return dict(sizes), assumed, others
