"""Read a model's attributes from `config.json`, with the family's defaults for those it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_shard.autoep.family import Family, SettingRule
from moe_shard.config.keys import shown
from moe_shard.config.load import base_settings
from moe_shard.config.overlays import TYPES_IN_WORDS
from moe_shard.errors import UserError


class Attributes:
    """Give a model's attributes by name; dots lead into objects.

    Args:
        written: the content of `config.json`.
        family: has other names and defaults of attributes.
        where: the file, for messages.

    Raises:
        UserError: an attribute under two names with two values, the family's section is missing,
            or a value that this package does not compute.
    """

    def __init__(self, written: Mapping[str, Any], family: Family, where: Path) -> None:
        self.where = where
        if family.config_section:
            section = written.get(family.config_section)
            if not isinstance(section, dict):
                raise self.error(f"no {family.config_section}", "the config.json of the model")
            written = section | {
                name: written[name] for name in ("quantization_config",) if name in written
            }
        self.written = dict(written)
        for other, name in family.aliases.items():
            if other not in self.written:
                continue
            value = self.written.pop(other)
            if self.written.setdefault(name, value) != value:
                raise self.error(
                    f"{other}={shown(value)} and {name}={shown(self.written[name])} are one thing",
                    "keep one of them",
                )
        self._values = {**family.attributes, **self.written}
        self._check_computed(family)

    def error(self, what: str, fix: str) -> UserError:
        """Return an error about the file."""
        return UserError(f"{self.where}: {what}\nfix: {fix}")

    def get(self, name: str) -> Any:
        """Return an attribute's value; None where it is null or missing."""
        value: Any = self._values
        for part in name.split(".") if name else ():
            value = value.get(part) if isinstance(value, dict) else None
        return value if name else None

    def as_text(self, name: str) -> str:
        """Return `name=value`, for messages."""
        return f"{name}={shown(self.get(name))}"

    def number(self, name: str, default: int) -> int:
        """Return an attribute that is a whole number of 0 or more, or -1.

        Args:
            name: the attribute; "": the default.
            default: where it is null.

        Raises:
            UserError: something else.
        """
        value = self.get(name)
        if value is None:
            return default
        if type(value) is not int or value < -1:
            raise self.error(f"{self.as_text(name)} is not a whole number", "as the model has it")
        return value

    def numbers(self, name: str) -> list[int] | None:
        """Return an attribute that is a list of whole numbers from 0; None where it is null.

        Raises:
            UserError: something else.
        """
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
            raise self.error(
                f"{self.as_text(name)} is not a list of numbers", "as the model has it"
            )
        return value

    def source(self, rule: SettingRule) -> str:
        """Return the attribute that a rule's value comes from; "" where none counts."""
        if any(self.get(name) != value for name, value in rule.when):
            return ""
        return next((name for name in rule.sources if self.get(name) is not None), "")

    def value(self, key: str, rule: SettingRule) -> Any:
        """Return a setting's value.

        Args:
            key: of `base.yml`, whose default there has the type.
            rule: where the value comes from.

        Raises:
            UserError: there is none, or it is of another type or not among those that are known.
        """
        name = self.source(rule)
        if not name:
            if rule.required:
                raise self.error(f"no {' or '.join(rule.sources)}", "the config.json of the model")
            return rule.default
        value = self.get(name)
        if rule.mapping:
            known = dict(rule.mapping)
            if shown(value) not in known:
                raise self.error(
                    f"{self.as_text(name)} is not computed here", f"one of {', '.join(known)}"
                )
            return known[shown(value)]
        kind = type(base_settings()[key])
        # Attributes that switch something are sometimes numbers; lists and text never are.
        accepted = {bool: (bool, int), float: (int, float)}.get(kind, (kind,))
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise self.error(
                f"{self.as_text(name)} is not {TYPES_IN_WORDS[kind]}", "as the model has it"
            )
        return kind(value)

    def _check_computed(self, family: Family) -> None:
        for name, allowed in family.require.items():
            values = allowed if isinstance(allowed, list) else [allowed]
            if self.get(name) is not None and self.get(name) not in values:
                raise self.error(
                    f"{self.as_text(name)} is not computed here",
                    f"a model with {name}={' or '.join(map(shown, values))}",
                )
