"""Read the rules of a family file that say where the value of a setting comes from."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.errors import UserError

_RULE = ("from", "else", "map", "when", "skip", "some", "count", "power")
"""Entries of a rule that says where a value comes from."""


@dataclass(frozen=True)
class SettingRule:
    """Describe where the value of a setting comes from.

    Attributes:
        sources: attributes of `config.json`, the first of which that is not null applies; dots lead
            into objects.
        default: the value where all are null; without sources, always.
        required: whether it is an error if all are null.
        mapping: the attribute's value as text -> the setting's value; empty: the same value.
        when: attribute -> the value that it must have for the sources to apply.
        skip: values of the sources that count as null.
        some: the setting's value wherever a source applies; None: that source's.
        count: whether it is the number of a list's entries, or of a text's letters.
        power: exponent that a number is raised to.
    """

    sources: tuple[str, ...] = ()
    default: Any = None
    required: bool = False
    mapping: tuple[tuple[str, Any], ...] = ()
    when: tuple[tuple[str, Any], ...] = ()
    skip: tuple[Any, ...] = ()
    some: Any = None
    count: bool = False
    power: float = 1.0


def read_rule(path: Path, key: str, value: Any) -> SettingRule:
    """Read a rule in its YAML form.

    Args:
        path: the family's file, for messages.
        key: the setting, for messages.
        value: text: an attribute; a mapping: see `defaults.yml`; anything else: the value itself.

    Raises:
        UserError: a mapping of another form.
    """
    if isinstance(value, str):
        return SettingRule(sources=(value,), required=True)
    if not isinstance(value, dict):
        return SettingRule(default=value)
    for name in value:
        check_known(path, f"{key}.", name, (*_RULE, "value"))
    if set(value) == {"value"}:
        return SettingRule(default=value["value"])
    sources, mapping, when = value.get("from"), value.get("map", {}), value.get("when", {})
    sources = [sources] if isinstance(sources, str) else sources
    power = value.get("power", 1.0)
    is_list = isinstance(sources, list) and all(isinstance(name, str) for name in sources)
    is_rule = isinstance(mapping, dict) and isinstance(when, dict) and type(power) in (int, float)
    if not sources or not is_list or not is_rule:
        raise UserError(
            f"{path}: {key}={shown(value)} does not say where its value comes from\n"
            "fix: {from: attribute, else: value}, for example"
        )
    return SettingRule(
        sources=tuple(sources),
        default=value.get("else"),
        required="else" not in value,
        mapping=tuple((shown(name), each) for name, each in mapping.items()),
        when=tuple(when.items()),
        skip=(value["skip"],) if "skip" in value else (),
        some=value.get("some"),
        count=value.get("count") is True,
        power=power,
    )


def check_known(path: Path, inside: str, key: Any, known: Collection[str]) -> None:
    """Refuse a key that a family file cannot have.

    Args:
        path: the file, for the message.
        inside: what the key is below, with a dot; empty: it is an outer one.
        key: the key.
        known: keys that there are.

    Raises:
        UserError: it is not among them.
    """
    if key in known:
        return
    near = difflib.get_close_matches(str(key), known, n=1)
    fix = f"did you mean {near[0]}?" if near else "configs/families/defaults.yml lists every key"
    raise UserError(f"{path}: unknown key {inside}{shown(key)}\nfix: {fix}")
