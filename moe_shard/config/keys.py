"""Give each leaf of a configuration dataclass its YAML key and the values it takes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from moe_shard.errors import UserError


@dataclasses.dataclass(frozen=True)
class Key:
    """Describe the YAML key of a leaf and its values, for `Annotated[type, Key(...)]`.

    Attributes:
        name: the key as written in YAML; by default the attribute's own name. Only MaxText's
            `base_` is left out of an attribute, as MaxText leaves it out of what its code reads.
        least: smallest value.
        above: values are larger than this.
        most: largest value.
        below: values are smaller than this.
        off: one more value, outside the range, that switches the thing off.
        choices: the only values, where the leaf is a name.
        each: the only items, where the leaf is a list of names.
    """

    name: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    off: float | None = None
    choices: tuple[str, ...] = ()
    each: tuple[str, ...] = ()

    def range_text(self) -> str:
        """Return the range in words, such as "at least 1, or -1"."""
        bounds = {
            "at least": self.least,
            "above": self.above,
            "at most": self.most,
            "below": self.below,
        }
        words = [f"{word} {bound:.10g}" for word, bound in bounds.items() if bound is not None]
        return " and ".join(words) + (f", or {self.off:g}" if self.off is not None else "")

    def admits(self, value: float) -> bool:
        """Return whether a number lies in the range."""
        return value == self.off or (
            (isinstance(value, int) or math.isfinite(value))
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


MOST_SIZE = 2**24
"""Largest size of a dim of the parameters; far above any model."""
_MOST_INT32 = 2**31 - 1
"""Largest whole number of a key without a bound of its own: programs count in 32 bits."""


def leaf_keys(schema: type) -> Mapping[str, Key]:
    """Return {attribute name: key} of the leaves of one dataclass."""
    return _leaf_keys(schema)


@functools.cache
def _leaf_keys(schema: Any) -> Mapping[str, Key]:
    hints = get_type_hints(schema, include_extras=True)
    keys = {
        attribute: dataclasses.replace(extra, name=extra.name or attribute)
        for attribute, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Key)
    }
    for attribute, key in keys.items():
        whole = get_args(hints[attribute])[0] is int
        if whole and key.most is None and key.below is None:
            keys[attribute] = dataclasses.replace(key, most=_MOST_INT32)
    return keys


def check_leaves(part: object) -> None:
    """Check every leaf of a dataclass instance against its own key.

    Raises:
        UserError: a number out of its range, or a name that is not among the choices.
    """
    for attribute, key in leaf_keys(type(part)).items():
        value = getattr(part, attribute)
        if key.choices and value not in key.choices:
            raise UserError(
                f"{key.name}={shown(value)} is not a known {key.name}\n"
                f"fix: {key.name} one of {', '.join(key.choices)}"
            )
        items = value if isinstance(value, tuple) else (value,)
        if key.each and not set(items) <= set(key.each):
            raise UserError(
                f"{key.name}={shown(value)} is not a list of known names\n"
                f"fix: {key.name} of {', '.join(key.each)}"
            )
        if any(isinstance(item, str) and not item.isprintable() for item in items):
            raise UserError(
                f"{key.name}={shown(value)} has a line break or another unprintable character\n"
                f"fix: {key.name} on one line"
            )
        numbers = [x for x in items if isinstance(x, int | float) and not isinstance(x, bool)]
        if not all(key.admits(number) for number in numbers):
            raise UserError(
                f"{key.name}={shown(value)} is out of range\n"
                f"fix: {key.name} {key.range_text() or 'a finite number'}"
            )


def keyed_values(part: object) -> dict[str, Any]:
    """Return {YAML key: value in plain YAML types} of the leaves of one dataclass instance."""
    return {
        key.name: to_plain(getattr(part, attribute))
        for attribute, key in leaf_keys(type(part)).items()
    }


def to_plain(value: Any) -> Any:
    """Convert tuples to lists, all the way down, which is what YAML writes and reads back."""
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def shown(value: Any) -> str:
    """Write a value as a person would in YAML, on one line and not too long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**60:
        return f"a number of {value.bit_length()} bits"  # Python writes none of 4,300 digits
    is_list = isinstance(value, tuple | list)
    text = f"[{', '.join(map(shown, value))}]" if is_list else str(value)
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def divisors(number: int) -> list[int]:
    """List all divisors of a positive number, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]
