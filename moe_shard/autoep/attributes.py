"""Read a model's attributes from `config.json`, with the family's defaults for missing ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_shard.autoep.family import Family
from moe_shard.autoep.layer_overrides import OVERRIDES, of_global_layers
from moe_shard.autoep.setting_rule import SettingRule
from moe_shard.autoep.strict_json import fix_of, in_json
from moe_shard.config.keys import shown
from moe_shard.config.load import base_settings
from moe_shard.config.overlays import TYPES_IN_WORDS
from moe_shard.errors import UserError

_WITHOUT_EFFECT = frozenset(
    (
        *("architectures", "model_type", "auto_map", "_name_or_path", "transformers_version"),
        *("torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("initializer_range", "attention_dropout", "output_router_logits"),
    )
)
"""Attributes that do not affect what the decoder computes from weights and tokens."""
_MOST = 2**63 - 1
"""Far above any size; what follows divides and multiplies floats by it."""


class Attributes:
    """Give a model's attributes by name; dots lead into objects, and by number into lists.

    Args:
        written: the content of `config.json`.
        family: provides other names and defaults of attributes.
        where: the file, for messages.

    Raises:
        UserError: an attribute has two names with two values, the family's section is missing, or a
            value is not supported by this package.
    """

    def __init__(self, written: Mapping[str, Any], family: Family, where: Path) -> None:
        self.where = where
        if family.config_section:
            section: Any = written
            for part in family.config_section.split("."):
                section = section.get(part) if isinstance(section, dict) else None
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
                both = f"{other}={in_json(value)} and {name}={in_json(self.written[name])}"
                raise self.error(f"{both} are one thing", "keep one of them")
        try:
            of_layers = of_global_layers(self.written, family)
        except ValueError as error:
            raise self.error(str(error), "a model whose layers of one type are alike") from None
        for name, value in of_layers.items():
            if self.written.setdefault(name, value) != value:
                both = f"{name}={in_json(self.written[name])} and {OVERRIDES}"
                raise self.error(f"{both} say two things", "keep one of them")
        self._values = {**family.attributes, **self.written}
        self._family = family
        self._read: set[str] = {OVERRIDES}
        self._check_computed(family)

    def error(self, what: str, fix: str) -> UserError:
        """Return an error about the file."""
        return UserError(f"{self.where}: {what}\nfix: {fix}")

    def get(self, name: str) -> Any:
        """Return an attribute's value; None where it is null or missing."""
        value: Any = self._values
        self._read.add(name.partition(".")[0])
        for part in name.split(".") if name else ():
            if isinstance(value, list) and part.isdecimal():
                value = value[int(part)] if int(part) < len(value) else None
            else:
                value = value.get(part) if isinstance(value, dict) else None
        return value if name else None

    def usual(self, name: str) -> Any:
        """Return the family's value of an attribute, where null in `config.json` means that."""
        return self._family.attributes.get(name)

    def notes(self) -> list[str]:
        """Return lines on how `config.json` and the family differ; call it once all is read.

        They name attributes that nothing reads, except those that are null, false, 0 or empty or
        that do not affect the computation, values of the family that `config.json` lacks, and what
        the family's own file says to no effect.
        """
        at = self._family
        named = {getattr(at.spans, each.name) for each in fields(at.spans)}
        named |= {getattr(at.moe_layers, each.name) for each in fields(at.moe_layers)}
        named |= {at.mixers.types, at.mixers.full_every, at.correction_bias_switch}
        rules = [*at.settings.values(), at.num_experts_attr, at.top_k_attr, at.route_norm]
        rules += [at.route_scale, at.num_expert_groups, at.num_limited_groups, at.carried_layers]
        rules.append(at.carried_experts)
        for rule in rules:
            named.update(rule.sources, (name for name, _ in rule.when))
        roots = {str(name).partition(".")[0] for name in named} | self._read | _WITHOUT_EFFECT
        unread = [
            f"{name}={in_json(value)}"
            for name, value in self.written.items()
            if value and name not in roots
        ]
        assumed = [
            f"{name}={in_json(value)}"
            for name, value in at.attributes.items()
            if name in self._read and name not in self.written and value is not None
        ]
        lines = []
        if unread:
            lines.append(f"in config.json, and read by nothing: {', '.join(unread)}")
        if assumed:
            lines.append(f"not in config.json, as family {at.name} has it: {', '.join(assumed)}")
        return lines + self._without_effect()

    def _without_effect(self) -> list[str]:
        """Return lines on what the family's own file says, and `config.json` makes nothing of."""
        own, lines = self._family.own, []
        attributes = own.get("attributes") or {}
        replaced = [
            f"{name}={in_json(value)} (config.json: {in_json(self.written[name])})"
            for name, value in attributes.items()
            if name in self.written and self.written[name] != value
        ]
        if replaced:
            lines.append(
                f"attributes of family {self._family.name} that config.json has otherwise, which "
                f"counts; under settings they would: {', '.join(replaced)}"
            )
        missing = [
            f"{key}.{entry}: {name}"
            for key in ("spans", "moe_layers", "mixers")
            for entry, name in (own.get(key) or {}).items()
            if entry not in ("otherwise", "last")
            and isinstance(name, str)
            and name
            and name not in self._values
        ]
        if missing:
            lines.append(
                f"attributes that family {self._family.name} names and neither it nor config.json "
                f"has: {', '.join(missing)}"
            )
        return lines

    def as_text(self, name: str) -> str:
        """Return `name=value`, for messages."""
        return f"{name}={in_json(self.get(name))}"

    def number(self, name: str, default: int) -> int:
        """Return an attribute that is a whole number of 0 or more, or -1, and of 63 bits.

        Args:
            name: the attribute; empty: the default.
            default: the value where it is null.

        Raises:
            UserError: it is something else.
        """
        value = self.get(name)
        if value is None:
            return default
        if type(value) is not int or value < -1:
            raise self.error(f"{self.as_text(name)} is not a whole number", fix_of(value))
        if value > _MOST:
            raise self.error(f"{self.as_text(name)} is out of range", "as the model has it")
        return value

    def numbers(self, name: str) -> list[int] | None:
        """Return an attribute that is a list of whole numbers from 0; None where it is null.

        Raises:
            UserError: it is something else.
        """
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
            raise self.error(
                f"{self.as_text(name)} is not a list of numbers", "as the model has it"
            )
        return value

    def names(self, name: str, layers: int, known: Collection[str]) -> list[str] | None:
        """Return an attribute that has a name for each layer; None where it is null.

        It is a list, or a text of one letter for each.

        Args:
            name: the attribute.
            layers: number of layers.
            known: the names that mean something here.

        Raises:
            UserError: it is something else.
        """
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, str):
            value = [*value]
        if not isinstance(value, list) or len(value) != layers:
            raise self.error(
                f"{self.as_text(name)} is not a list of {layers} names", "one for each layer"
            )
        unknown = [each for each in value if not isinstance(each, str) or each not in known]
        if unknown:
            raise self.error(
                f"{name}: {in_json(unknown[0])} is not computed here", f"one of {', '.join(known)}"
            )
        return value

    def source(self, rule: SettingRule) -> str:
        """Return the attribute that a rule's value comes from; empty where none applies."""
        if any(self.get(name) != value for name, value in rule.when):
            return ""
        found = ((name, self.get(name)) for name in rule.sources)
        return next((name for name, value in found if value not in (None, *rule.skip)), "")

    def rule_text(self, key: str, rule: SettingRule) -> str:
        """Return where a setting's value is from and the value, for messages."""
        source = self.source(rule)
        return self.as_text(source) if source else f"{key}={shown(rule.default)}"

    def value(self, key: str, rule: SettingRule) -> Any:
        """Return a setting's value.

        Args:
            key: a key of `base.yml`; its default has the type of the value.
            rule: the source of the value.

        Raises:
            UserError: there is none, it has another type, or it is not a known value.
        """
        name = self.source(rule)
        if not name:
            if rule.required:
                wanted = " or ".join(rule.sources)
                fix = f"the config.json of the model, or what the family's file has for {key}"
                if type(base_settings()[key]) is str:
                    fix += f" as {{value: {wanted}}} where that is text, not an attribute"
                raise self.error(f"no {wanted}, from which {key} is read", fix)
            return rule.default
        if rule.some is not None:
            return rule.some
        value = self.get(name)
        if rule.count and isinstance(value, list | str):
            self._check_count(rule, name, len(value))
            return len(value)
        if rule.mapping:
            known = dict(rule.mapping)
            if isinstance(value, list) and value and all(each == value[0] for each in value):
                value = value[0]  # one for each layer
            if shown(value) not in known:
                raise self.error(
                    f"{self.as_text(name)} is not computed here", f"one of {', '.join(known)}"
                )
            return known[shown(value)]
        kind = type(base_settings()[key])
        if isinstance(value, list) and value and kind is not list:
            # A value for each layer.
            if any(each != value[0] for each in value):
                raise self.error(
                    f"{self.as_text(name)} differs between layers, which is not computed here",
                    "a model where all layers have one",
                )
            value = value[0]
        # Attributes that switch something may be numbers, but not lists or text.
        accepted = {bool: (bool, int), float: (int, float)}.get(kind, (kind,))
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{self.as_text(name)} is not {TYPES_IN_WORDS[kind]}", fix_of(value))
        try:
            # A root of a negative number is complex, which no kind takes.
            number: Any = value
            return kind(number if rule.power == 1 else number**rule.power)
        except (ArithmeticError, TypeError):
            raise self.error(
                f"{self.as_text(name)} is out of range", "as the model has it"
            ) from None

    def _check_count(self, rule: SettingRule, name: str, found: int) -> None:
        """Refuse another number than that of a list's entries, or a text's letters."""
        for other in rule.sources:
            number = self.get(other)
            if isinstance(number, int) and number != found:
                raise self.error(
                    f"{self.as_text(other)}, and {name} has {found} entries",
                    "as many as there are layers",
                )

    def _check_computed(self, family: Family) -> None:
        for name, allowed in family.require.items():
            values = allowed if isinstance(allowed, list) else [allowed]
            if self.get(name) is not None and self.get(name) not in values:
                raise self.error(
                    f"{self.as_text(name)} is not computed here",
                    f"a model with {name}={' or '.join(map(in_json, values))}",
                )
