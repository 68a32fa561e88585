"""Read rule tables and mesh axes, lay tables over each other, and fill `MeshConfig`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.config.maxtext_keys import MaxTextKeys
from moe_shard.config.mesh_config import (
    LEVELS,
    MESH_AXES,
    MeshConfig,
    Rule,
    expert_rule,
    parallelism_key,
)
from moe_shard.config.overlays import COMMAND_LINE, Overlay, short_name, unknown_key
from moe_shard.config.strict_yaml import read_mapping
from moe_shard.errors import UserError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_rules_file(path: Path, keys: MaxTextKeys) -> Overlay:
    """Read a file for `custom_mesh_and_rule`: `mesh_axes` and `logical_axis_rules`.

    Args:
        path: the file.
        keys: MaxText's keys; those in its rule files that concern something else are ignored.

    Raises:
        UserError: the file cannot be read, has no table, or has something else in it.
    """
    content = read_mapping(path)
    own = ("mesh_axes", "logical_axis_rules")
    source = short_name(path)
    for key in content:
        if key not in own and key not in keys:
            raise unknown_key(source, key, own, list(keys.defaults))
    if "logical_axis_rules" not in content:
        raise UserError(
            f"{source}: no logical_axis_rules\nfix: rules as in configs/base.yml, or another file"
        )
    values = {key: content[key] for key in own if key in content}
    others = ", ".join(key for key in content if key not in own)
    notes = (f"{source}: of no meaning here: {others} (the rule table has it)",) if others else ()
    return Overlay(source, values, {}, notes)


def build_mesh(
    settings: Mapping[str, Any],
    base: Mapping[str, Any],
    overlays: Sequence[Overlay],
    rules_file: Overlay | None,
    keys: MaxTextKeys,
) -> tuple[MeshConfig, tuple[str, ...]]:
    """Build the mesh and its table, with warnings.

    Args:
        settings: the flat settings with all overlays applied.
        base: `base.yml`.
        overlays: the model file's and the command line's, in this order.
        rules_file: the file that `custom_mesh_and_rule` names, if any.
        keys: MaxText's, for the axes of its meshes and the rules of its tables.

    Raises:
        UserError: an invalid rule or axis, or a size for an axis that `mesh_axes` leaves out.
    """
    own_table = table = read_rules(base["logical_axis_rules"], "base.yml")
    axes, chosen_by = MESH_AXES, "base.yml"
    warnings: list[str] = []
    sources = [*([rules_file] if rules_file else []), *overlays]
    for overlay in sources:
        # A table of MaxText's may name axes that this mesh lacks. They have size 1 there unless a
        # key says otherwise, and such a key is refused, so nothing is lost.
        foreign = () if overlay.source == COMMAND_LINE else _foreign_axes(overlay, keys)
        if foreign:
            warnings.append(
                f"{overlay.source}: mesh axes of MaxText that this mesh does not have, read as "
                f"size 1: {', '.join(foreign)}"
            )
        if "mesh_axes" in overlay.values:
            axes, chosen_by = read_axes(overlay, foreign) or axes, overlay.source
        if "logical_axis_rules" not in overlay.values:
            continue
        rules = read_rules(overlay.values["logical_axis_rules"], overlay.source, foreign)
        replace = overlay is rules_file or (
            overlay.values.get("override_logical_axis_rules", False)
            if overlay.source == COMMAND_LINE
            else settings["override_logical_axis_rules"]
        )
        table = rules if replace else lay_rules(table, rules)
        if is_maxtext_table(rules, foreign, keys):
            table, notes = completed(table, own_table, keys)
            warnings += [f"{overlay.source}: {note}" for note in notes]
        elif unknown := _unknown_names(rules, own_table):
            warnings.append(
                f"{overlay.source}: rules of logical axes that this package does not have: "
                f"{unknown}"
            )
    explicit = {key for overlay in overlays for key in overlay.values}
    sizes = {level: _sizes(level, settings, explicit, axes, chosen_by) for level in LEVELS}
    whole = (*axes, *(axis for axis in MESH_AXES if axis not in axes))
    mesh = MeshConfig(
        mesh_axes=whole,
        ici=tuple(sizes["ici"][axis] for axis in whole),
        dcn=tuple(sizes["dcn"][axis] for axis in whole),
        logical_axis_rules=tuple(table),
        rule_conflicts=settings["rule_conflicts"],
        num_simulated_devices=settings["num_simulated_devices"],
    )
    return mesh, tuple(warnings)


def _unknown_names(rules: Sequence[Rule], own: Sequence[Rule]) -> str:
    """Name the logical axes of `rules` that `own` lacks, each with the nearest known one."""
    known = list(dict.fromkeys(name for name, _ in own))
    named = []
    for name in dict.fromkeys(name for name, _ in rules if name not in known):
        near = difflib.get_close_matches(name, known, n=1)
        named.append(f"{name} (did you mean {near[0]}?)" if near else name)
    return ", ".join(named)


def read_table(path: Path, keys: MaxTextKeys, own: Sequence[Rule]) -> tuple[list[Rule], list[str]]:
    """Read the rules of a file for a given mesh, and notes on what was changed.

    Its other keys, `mesh_axes` among them, are not read. A table without names that only MaxText
    has is returned as it is written.

    Args:
        path: a YAML file with `logical_axis_rules`.
        keys: MaxText's.
        own: the rules of `base.yml`, for the names that a table of MaxText's is completed with.

    Raises:
        UserError: the file cannot be read, or has no table of this form.
    """
    content, source = read_mapping(path), short_name(path)
    if not content.get("logical_axis_rules"):
        raise UserError(
            f"{path}: no logical_axis_rules\nfix: a file with rules such as [exp, [expert]]"
        )
    overlay = Overlay(source, {"logical_axis_rules": content["logical_axis_rules"]}, {}, ())
    foreign = _foreign_axes(overlay, keys)
    rules = read_rules(content["logical_axis_rules"], source, foreign)
    notes = []
    if foreign:
        notes.append(f"{source}: mesh axes of MaxText, read as size 1: {', '.join(foreign)}")
    if is_maxtext_table(rules, foreign, keys):
        rules, more = completed(rules, own, keys)
        notes += [f"{source}: {note}" for note in more]
    return rules, notes


def is_maxtext_table(
    rules: Sequence[tuple[str, Sequence[str]]], axes: Sequence[str], keys: MaxTextKeys
) -> bool:
    """Return whether rules are of a MaxText table: they use names that only its tables have.

    Args:
        rules: the rules of the table.
        axes: mesh axes that it names.
        keys: MaxText's.
    """
    named = {*axes, *(axis for _, rule in rules for axis in rule)}
    return bool(named & set(keys.mesh_axes)) or any(name in keys.logical_axes for name, _ in rules)


def completed(
    table: Sequence[Rule], own: Sequence[Rule], keys: MaxTextKeys
) -> tuple[list[Rule], list[str]]:
    """Complete a MaxText table with a rule for every logical axis here, and note what was added.

    In MaxText a dim without a rule is not sharded. It has no rule `activation_batch_no_exp` either:
    its code takes the expert axes off the batch dim.

    Args:
        table: the rules.
        own: the rules of `base.yml`, for the names.
        keys: MaxText's.
    """
    rules = [rule for rule in table if rule[0] not in keys.logical_axes]
    idle = list(dict.fromkeys(name for name, _ in table if name in keys.logical_axes))
    known = {name for name, _ in rules}
    notes = []
    if "activation_batch_no_exp" not in known:
        experts = next((set(rule) for name, rule in rules if name == expert_rule(known)), set())
        at = [n for n, (name, _) in enumerate(rules) if name == "activation_batch_moe"]
        batch = [tuple(axis for axis in rules[n][1] if axis not in experts) for n in at]
        made = [("activation_batch_no_exp", axes) for axes in batch]
        rules[at[-1] + 1 if at else 0 : at[-1] + 1 if at else 0] = made
        known |= {name for name, _ in made}
    bare = [name for name in dict.fromkeys(name for name, _ in own) if name not in known]
    rules = list(dict.fromkeys([*rules, *((name, ()) for name in bare)]))
    if bare:
        notes.append(f"no rule, so not sharded, as in MaxText: {', '.join(bare)}")
    if idle:
        some = ", ".join(idle[:4]) + (f" and {len(idle) - 4} more" if len(idle) > 4 else "")
        notes.append(f"rules of logical axes that this package does not have: {some}")
    return rules, notes


def read_rules(value: Any, source: str, foreign: Sequence[str] = ()) -> list[Rule]:
    """Read rules as YAML has them: `[name, axis]`, `[name, [axes]]` or `[name, null]`.

    Args:
        value: the list.
        source: the source, for messages.
        foreign: mesh axes to leave out of the rules.

    Raises:
        UserError: a rule of another form.
    """
    rules: list[Rule] = []
    for rule in value if isinstance(value, list) else [value]:
        name, axes = rule if isinstance(rule, list) and len(rule) == 2 else ("", None)
        axes = [] if axes is None else [axes] if isinstance(axes, str) else axes
        parts = [name, *axes] if isinstance(axes, list) else [None]
        if not all(isinstance(part, str) and _NAME.fullmatch(part) for part in parts):
            raise UserError(
                f"{source}: rule {shown(rule)} of logical_axis_rules is not [name, [mesh axes]]\n"
                "fix: logical_axis_rules is a list of rules, for example [[exp, [expert]]]"
            )
        rules.append((name, tuple(axis for axis in axes if axis not in foreign)))
    return rules


def lay_rules(table: Sequence[Rule], rules: Sequence[Rule]) -> list[Rule]:
    """Lay rules over a table: they replace all rules of their logical axes and come last.

    Args:
        table: the rules so far.
        rules: the rules of a source with precedence over it, as in MaxText.
    """
    replaced = {name for name, _ in rules}
    return [rule for rule in table if rule[0] not in replaced] + list(rules)


def read_axes(overlay: Overlay, foreign: Sequence[str]) -> tuple[str, ...]:
    """Read `mesh_axes` of one source, without `foreign`; empty where it has none.

    Raises:
        UserError: not a list of this mesh's axes, each once.
    """
    axes = overlay.values.get("mesh_axes", [])
    if not isinstance(axes, list) or not all(isinstance(axis, str) for axis in axes):
        raise UserError(
            f"{overlay.source}: mesh_axes={shown(axes)} is not a list of names\n"
            f"fix: [{', '.join(MESH_AXES)}] or a part of it"
        )
    kept = tuple(axis for axis in axes if axis not in foreign)
    for axis in kept:
        if axis not in MESH_AXES:
            raise UserError(
                f"{overlay.source}: mesh_axes names {shown(axis)}, which this mesh does not have\n"
                f"fix: leave it out, and the rules that name it; there are {', '.join(MESH_AXES)}"
            )
    if len(set(kept)) < len(kept):
        raise UserError(f"{overlay.source}: mesh_axes={shown(axes)} names an axis twice\nfix: once")
    return kept


def _foreign_axes(overlay: Overlay, keys: MaxTextKeys) -> tuple[str, ...]:
    """Return the axes of MaxText's that a source names in its mesh or in its rules."""
    axes, rules = overlay.values.get("mesh_axes", []), overlay.values.get("logical_axis_rules", [])
    named = list(axes) if isinstance(axes, list) else []
    for rule in rules if isinstance(rules, list) else []:
        of = rule[1] if isinstance(rule, list) and len(rule) == 2 else None
        named += [of] if isinstance(of, str) else of if isinstance(of, list) else []
    found = (axis for axis in named if isinstance(axis, str) and axis in keys.mesh_axes)
    return tuple(dict.fromkeys(found))


def _sizes(
    level: str, settings: Mapping[str, Any], explicit: set[str], axes: Sequence[str], chosen_by: str
) -> dict[str, int]:
    """Return the sizes of one level; a default -1 yields to one that the user sets."""
    sizes = {axis: settings[parallelism_key(level, axis)] for axis in MESH_AXES}
    own = {axis for axis in MESH_AXES if parallelism_key(level, axis) in explicit}
    taken_over = any(sizes[axis] == -1 for axis in own)
    for axis, size in sizes.items():
        if axis in own and axis not in axes and size != 1:
            key = parallelism_key(level, axis)
            raise UserError(
                f"{key}={size}, but mesh_axes of {chosen_by} leaves {axis!r} out\n"
                f"fix: {key}=1, or mesh_axes with {axis}"
            )
        if size == -1 and axis not in own and (taken_over or axis not in axes):
            sizes[axis] = 1
    return sizes
