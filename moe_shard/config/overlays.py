"""Lay one source of settings over another and keep the types of `base.yml`.

ml_collections is used for this and nothing else: a locked `ConfigDict` takes each value in the type
of its default and refuses keys that `base.yml` lacks. What its check would accept (null, true
for a number) is refused before it. The rest of the package reads the frozen dataclasses of
`schema.py`, never a `ConfigDict`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from moe_shard.config.keys import shown
from moe_shard.config.strict_yaml import parse_yaml
from moe_shard.errors import UserError

COMMAND_LINE = "command line"
TYPES_IN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
}
"""Type of a key -> what a value of it is called in messages."""
_NULL_MEANS: Mapping[str, Any] = {
    # In MaxText None means all checkpoints, and no file.
    "max_num_checkpoints_to_keep": -1,
    "tokenizer_path": "",
    "dataset_path": [],
    "run_name": "",
    "base_output_directory": "",
}
_ONE_OR_MORE = (
    *("dataset_path", "eval_dataset_path", "train_data_columns", "eval_data_columns"),
    "trainable_parameters_mask",
)
"""Keys whose list may be written as its only item."""
_LISTS_OF: Mapping[str, type] = {
    "dataset_weights": float,
    "dense_layers": int,
    "nope_layers": int,
    "layers_without_mlp": int,
    "rope_short_factors": float,
    "rope_long_factors": float,
}
"""Keys whose lists hold numbers; other lists hold names."""
_LARGEST_INT = 2**63


@dataclasses.dataclass(frozen=True)
class Overlay:
    """Hold one source of settings, by key of `base.yml`.

    Attributes:
        source: a file's name or `COMMAND_LINE`, for messages.
        values: key -> value as written.
        unbuilt: key -> its value and what it requests that is not built here; None where a key is
            given a value that is supported.
        notes: one line each on what became of MaxText's keys.
    """

    source: str
    values: dict[str, Any]
    unbuilt: dict[str, tuple[Any, str] | None]
    notes: tuple[str, ...]


def unknown_key(
    source: str, key: str, own: Collection[str], maxtext_keys: Collection[str]
) -> UserError:
    """Return the error for an unknown key, with the nearest known one."""
    near = difflib.get_close_matches(key, own, n=1) or difflib.get_close_matches(
        key, maxtext_keys, n=1, cutoff=0.75
    )
    fix = f"did you mean {near[0]}?" if near else "configs/base.yml lists every key"
    return UserError(f"{source}: unknown key {shown(key)}\nfix: {fix}")


def parse_overrides(overrides: Sequence[str], base: Mapping[str, Any]) -> dict[str, Any]:
    """Read `key=value` arguments; of a key that is given twice, the last value counts.

    Args:
        overrides: arguments of a command line.
        base: `base.yml`, or keys and values beyond it, for the type each key has.

    Raises:
        UserError: an argument without `=`, without a key, or with a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for argument in overrides:
        name, equals, text = argument.partition("=")
        name, text = name.strip(), text.strip()
        if not equals or not name:
            raise UserError(
                f"{COMMAND_LINE}: {shown(argument)} is not key=value\nfix: for example steps=100"
            )
        default = base.get(name)
        if isinstance(default, str):
            # Text is used as it is written, so that run_name=12 and run_name=yes are names.
            quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
            values[name] = text[1:-1] if quoted else text
            continue
        if name in _ONE_OR_MORE and not text.startswith("["):
            values[name] = text
            continue
        try:
            values[name] = parse_yaml(text)
        except UserError as error:
            raise UserError(
                f"{COMMAND_LINE}: {shown(argument)}: {shown(str(error))}\n"
                f"fix: {shown(name)}={'VALUE' if default is None else _example(default)}"
            ) from error
    return values


def _example(default: Any) -> str:
    """Write a default as an example; for a rule table, its shortest rule."""
    is_table = isinstance(default, list | tuple) and any(isinstance(x, list) for x in default)
    return shown([min(default, key=lambda row: len(shown(row)))] if is_table else default)


def lay_over(base: Mapping[str, Any], overlays: Sequence[Overlay]) -> dict[str, Any]:
    """Lay sources over `base.yml`, converting each value to the type of its default.

    Args:
        base: `base.yml`.
        overlays: the sources, from the weakest to the strongest.

    Raises:
        UserError: a value of another type.
    """
    settings = config_dict.ConfigDict(dict(base))
    settings.lock()
    for overlay in overlays:
        for key, value in overlay.values.items():
            try:
                settings[key] = _prepared(key, value, base[key])
            except (TypeError, ValueError, OverflowError):
                raise UserError(
                    f"{overlay.source}: {key}={shown(value)} is "
                    f"{_what_is_wrong(value, type(base[key]))}\n"
                    f"fix: {key}={_example(base[key])}, for example"
                ) from None
    return {key: _plain(settings[key]) for key in base}


def coerced(source: str, key: str, value: Any, default: Any) -> Any:
    """Convert a value to the type of its key's default; lists are kept as they are.

    Args:
        source: the source, for messages.
        key: the key.
        value: the value as written.
        default: the key's default.

    Raises:
        UserError: a value of another type.
    """
    kind = type(default)
    is_item = kind is list and isinstance(value, str) and key in _ONE_OR_MORE
    if kind not in TYPES_IN_WORDS or is_item:
        return value
    try:
        if isinstance(value, bool) != (kind is bool) or (kind is list) != isinstance(value, list):
            raise TypeError(key)
        if kind is float:
            return float(value)
        if kind is int:
            if isinstance(value, str):
                value = int(value)
            if value != int(value) or abs(value) >= _LARGEST_INT:
                raise ValueError(key)
            return int(value)
        if kind is str and not isinstance(value, str):
            raise TypeError(key)
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{source}: {key}={shown(value)} is {_what_is_wrong(value, kind)}\n"
            f"fix: {key}={shown(default)}, for example"
        ) from None
    return value


def _prepared(key: str, value: Any, default: Any) -> Any:
    """Convert or refuse what ConfigDict's own check would accept as it is: null and true.

    Raises:
        TypeError: null, or a bool where a number is wanted.
        ValueError: text that is not a number, or an integer beyond 64 bits.
        OverflowError: an integer too large for a float.
    """
    # "None" is MaxText's null, but also the name of a model in None.yml.
    if value is None or (value == "None" and (key in _NULL_MEANS or default != str(default))):
        if key not in _NULL_MEANS:
            raise TypeError(key)
        return _NULL_MEANS[key]
    if isinstance(value, bool) != isinstance(default, bool):
        raise TypeError(key)
    if isinstance(default, float):
        return float(value)
    if isinstance(value, int) and abs(value) >= _LARGEST_INT:
        raise ValueError(key)
    if isinstance(default, str) and not isinstance(value, str):
        raise TypeError(key)
    if key in _ONE_OR_MORE and isinstance(value, str):
        return [value] if value else []
    if isinstance(default, list) and not isinstance(value, list):
        raise TypeError(key)
    if isinstance(default, list) and key != "logical_axis_rules":
        return [_item(item, _LISTS_OF.get(key, str)) for item in value]
    return value


def _what_is_wrong(value: Any, kind: type) -> str:
    """Say why a value is not of a kind: the words after "is"."""
    if kind in (int, float) and type(value) is int:
        return "larger than any number here"
    return f"not {TYPES_IN_WORDS[kind]}"


def _item(item: Any, kind: type) -> Any:
    """Convert one item of a list to the type of the list's items.

    Raises:
        TypeError: it is something else.
        OverflowError: an integer too large for a float.
    """
    if kind is float and isinstance(item, int) and not isinstance(item, bool):
        return float(item)
    if not isinstance(item, kind) or isinstance(item, bool):
        raise TypeError(item)
    return item


def _plain(value: Any) -> Any:
    """Return lists without ConfigDict's wrappers."""
    return list(value) if isinstance(value, tuple | list) else value


def short_name(path: Path) -> str:
    """Return what messages call a file: its name, on one line."""
    return shown(path.name)
