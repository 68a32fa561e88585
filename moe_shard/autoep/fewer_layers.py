"""Leave out the last layers of a checkpoint: its tensors, and what `config.json` says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_shard.autoep.attributes import Attributes
from moe_shard.autoep.family import Family
from moe_shard.autoep.layer_overrides import OVERRIDES, of_first_layers
from moe_shard.autoep.tensor_names import unwrapped
from moe_shard.errors import UserError

KEY = "base_num_decoder_layers"


def layer_of(tensor: str, family: Family) -> int | None:
    """Return the number of the decoder layer that a tensor is of; None: of none."""
    plain, starts = unwrapped(tensor), (f"{family.prefix}{name}." for name in family.layers)
    below = next((start for start in starts if plain.startswith(start)), None)
    if below is None:
        return None
    number, dot, _ = plain[len(below) :].partition(".")
    if not dot or not (number.isascii() and number.isdecimal()) or len(number) > 9:
        return None
    return int(number)


def with_layers(
    written: Mapping[str, Any], family: Family, layers: int, where: Path
) -> dict[str, Any]:
    """Return a `config.json` of the first layers of a model alone.

    Args:
        written: the content of `config.json`.
        family: names the attributes that speak of layers.
        layers: number of layers.
        where: the file, for messages.

    Raises:
        UserError: the model has fewer layers, or none of its attributes says how many.
    """
    attributes = Attributes(written, family, where)
    rule = family.settings[KEY]
    source, there = attributes.source(rule), attributes.value(KEY, rule)
    if layers > there or (layers < there and not source):
        raise UserError(
            f"{where}: {attributes.rule_text(KEY, rule)}, and {KEY}={layers}\n"
            f"fix: {KEY} of at most {there}, the layers that there are"
        )
    if layers == there:
        return dict(written)
    at, spans = family.moe_layers, family.spans
    changes: list[tuple[str, Callable[[Any], Any]]] = [
        (name, lambda value: layers if isinstance(value, int) else value[:layers])
        for name in ((source,) if not rule.count else rule.sources)
    ]
    changes += [
        (name, lambda value: value[:layers] if isinstance(value, list | str) else value)
        for name in {at.types, spans.types, spans.rope_flags, family.mixers.types}
        if name not in rule.sources
    ]
    changes += [
        (name, lambda value: [n for n in value if n < layers] if isinstance(value, list) else value)
        for name in {at.list, at.excluded}
    ]
    changes += [(name, lambda _: 0) for name in family.carried_layers.sources]
    changes += [(OVERRIDES, lambda value: of_first_layers(value, layers))]
    changed = dict(written)
    section = changed
    for part in family.config_section.split(".") if family.config_section else ():
        section[part] = dict(section[part])
        section = section[part]
    for name, change in changes:
        if name and attributes.get(name) is not None:
            _change(section, _name_there(section, name, family), change, attributes.get(name))
    return changed


def _name_there(section: Mapping[str, Any], name: str, family: Family) -> str:
    """Return an attribute's name in `config.json`, which may be an alias."""
    others = [other for other, meant in family.aliases.items() if meant == name]
    return next((other for other in others if other in section), name)


def _change(section: dict[str, Any], name: str, change: Callable[[Any], Any], value: Any) -> None:
    """Change an attribute, in a copy of the objects that it is in."""
    *outer, last = name.split(".")
    for part in outer:
        section[part] = dict(section[part])
        section = section[part]
    section[last] = change(value)
