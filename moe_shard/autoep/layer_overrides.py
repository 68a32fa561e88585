"""Read what `config.json` says of single layers, as transformers writes it: `per_layer_config`.

There, numbers of layers lead to attributes that these layers have otherwise. What is computed here
is one value for all layers of full attention, which is an attribute of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_shard.autoep.family import Family
from moe_shard.autoep.strict_json import in_json

OVERRIDES = "per_layer_config"
_FULL = "full_attention"


def of_global_layers(written: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the attributes that stand for those of the layers of full attention.

    Args:
        written: the part of `config.json` that describes the decoder.
        family: names these attributes.

    Raises:
        ValueError: the overrides, of which the message says what is not computed.
    """
    given = written.get(OVERRIDES)
    if given is None or (not given and not family.global_layers):
        return {}
    if not isinstance(given, dict) or not all(isinstance(each, dict) for each in given.values()):
        raise ValueError(f"{OVERRIDES}={in_json(given)} is not an object for each layer")
    if wrong := [key for key in given if not _is_number(key)]:
        raise ValueError(f"{OVERRIDES}: {in_json(wrong[0])} is not the number of a layer")
    by_layer = {int(key): each for key, each in given.items()}
    if len(by_layer) < len(given):
        raise ValueError(f"{OVERRIDES} has the number of one layer twice")
    others = {name for each in given.values() for name in each} - family.global_layers.keys()
    if others:
        raise ValueError(f"{OVERRIDES}: {min(others)} of some layers is not computed here")
    types = written.get(family.spans.types)
    full = [layer for layer, name in enumerate(types or ()) if name == _FULL]
    alike = [by_layer.get(layer, {}) for layer in full]
    if by_layer.keys() - {*full} or any(each != alike[0] for each in alike):
        raise ValueError(f"{OVERRIDES} is not one for all layers of {_FULL} and for none besides")
    of = alike[0] if alike else {}
    return {attribute: of.get(name) for name, attribute in family.global_layers.items()}


def _is_number(key: str) -> bool:
    """Return whether a key is the number of a layer; transformers pads them, such as "05" of 30."""
    return key.isascii() and key.isdecimal() and len(key) < 10


def of_first_layers(given: Any, layers: int) -> Any:
    """Return the overrides of the first layers alone.

    Args:
        given: the value of `per_layer_config`, which `of_global_layers` has read.
        layers: number of layers.
    """
    return {number: each for number, each in given.items() if int(number) < layers}
