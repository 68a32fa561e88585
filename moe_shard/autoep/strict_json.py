"""Read JSON from untrusted sources: no duplicate keys in objects, errors in one line."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.errors import UserError, first_line
from moe_shard.files import read_small

_LARGEST_FILE = 100_000_000  # bytes; an index of a hundred thousand tensors takes a tenth


def parse_json(text: bytes) -> Any:
    """Parse a JSON text.

    Raises:
        UserError: not JSON in UTF-8, or a key is given twice; one line, without the file's name.
    """
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_constant)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError("not text") from None
    except RecursionError:
        raise UserError("nested too deeply") from None
    except ValueError as error:
        raise UserError(f"not JSON: {shown(first_line(error))}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.

    Raises:
        UserError: the file cannot be read, is too large, or is not a JSON object.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise UserError(f"{path}: {size:,} bytes\nfix: a file of at most {_LARGEST_FILE:,}")
        text = read_small(path, _LARGEST_FILE)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}\nfix: a JSON file that can be read") from error
    try:
        value = parse_json(text)
    except UserError as error:
        raise UserError(f"{path}: {error}\nfix: correct it, or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object\nfix: correct it, or download it again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise UserError(f"the key {shown(twice)} stands twice")
    return values


def _constant(name: str) -> Any:
    """Read Infinity, which published files have as a limit, in the form of newer ones.

    It is an object, so that nothing takes it for a number that does not know the form.
    """
    if name == "Infinity":
        return {"__float__": name}
    raise UserError(f"{name} is not a number of JSON")


def in_json(value: Any) -> str:
    """Write a value for a message as the file has it: text in quotes, on one line, not too long.

    >>> in_json("2"), in_json(2), in_json(["a", None])
    ('"2"', '2', '["a", null]')
    """
    if isinstance(value, str):
        return f'"{shown(value)}"'
    if isinstance(value, list):
        text = f"[{', '.join(map(in_json, value[:20]))}]"
        return text if len(text) <= 60 else f"{text[:57]}..."
    return shown(value)


def fix_of(value: Any) -> str:
    """Return the fix for a value of another type than it has to be."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?", value):
        return "the number without quotes"
    return "as the model has it"
