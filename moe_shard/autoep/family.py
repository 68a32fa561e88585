"""Describe families of models as data: the names in their `config.json` and of their tensors.

A family is a file in `configs/families/` or the user's own. It is laid over the one that it is
based on, if any, and that over `defaults.yml`, which lists every key with its meaning.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from moe_shard.autoep.family_chain import lay_families
from moe_shard.autoep.setting_rule import SettingRule, check_known, read_rule
from moe_shard.autoep.strict_json import in_json
from moe_shard.config.keys import shown
from moe_shard.config.load import base_settings, configs_dir, find_file, list_names
from moe_shard.config.model_config import MixerName
from moe_shard.config.overlays import TYPES_IN_WORDS
from moe_shard.config.strict_yaml import read_mapping
from moe_shard.errors import UserError

DEFAULTS = "defaults"
_MOST_BASES = 8
OUTSIDE = ("embedding.", "final_norm.")
"""Prefixes of the paths of parameters outside the layers."""


@dataclass(frozen=True)
class LayersWithExperts:
    """Name the attributes that state which layers have experts; empty: no such attribute.

    Attributes:
        list: numbers of these layers; unless it is null, the other attributes are ignored.
        types: sparse or dense for each layer; unless it is null, those below are ignored.
        first: number of the first such layer.
        last: number of the last such layer; -1: the model's last layer.
        step: the last of every so many layers has experts.
        excluded: numbers of layers without experts.
    """

    list: str = ""
    types: str = ""
    first: str = ""
    last: str = ""
    step: str = ""
    excluded: str = ""


@dataclass(frozen=True)
class Spans:
    """Name the attributes that state what layers attend to; empty: no such attribute.

    Attributes:
        types: a name for each layer; unless it is null, `every`, `first` and `below` are ignored.
        window: tokens that a layer with a window attends to; null: no layer has one.
        switch: false: no layer has a window.
        every: the first of every so many layers has the window; a number, not an attribute.
        first: layers before this number have no window.
        below: layers from this number on have no window.
        chunk: tokens of a chunk; null: no chunks. The layers with RoPE are chunked.
        rope_flags: 0 for each layer without RoPE, 1 for the others; ignored if null or empty.
        nope_interval: the last of every so many layers has no RoPE, unless the flags apply.
        nope_types: names in `types` of layers without RoPE where some layer has a window.
        full_every: the last of every so many layers has no window, unless it is null.
        last: span that the model's last layer must have; empty: any.
    """

    types: str = ""
    window: str = ""
    switch: str = ""
    every: int = 1
    first: str = ""
    below: str = ""
    chunk: str = ""
    rope_flags: str = ""
    nope_interval: str = ""
    nope_types: tuple[str, ...] = ()
    full_every: str = ""
    last: str = ""


@dataclass(frozen=True)
class Mixers:
    """State what mixes the tokens of each layer.

    Attributes:
        types: an attribute: a name for each layer, in a list, or a letter, in a text; empty: none.
        names: name in `types` -> a mixer of `mixer_pattern`, or "experts" or "mlp": a layer that is
            nothing else. Where there are such, a layer with a mixer is that alone.
        full_every: an attribute: where `types` is null and this is not, the last of every so many
            layers has attention.
        otherwise: the mixer of all other layers where `types` is null.
    """

    types: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    full_every: str = ""
    otherwise: str = "attention"

    @property
    def one_block(self) -> bool:
        """Return whether a layer is a mixer, or experts, or an MLP, and nothing besides."""
        return not {*_BLOCKS}.isdisjoint(self.names.values())


_BLOCKS = ("experts", "mlp")


@dataclass(frozen=True)
class Family:
    """Hold the keys of one family file, see `configs/families/defaults.yml`.

    Attributes:
        name: the file's name without `.yml`.
        own: the keys that the file itself has, without those of its bases.
    """

    model_type: tuple[str, ...]
    architectures: tuple[str, ...]
    config_section: str
    prefix: str
    layers: tuple[str, ...]
    moe_layer_pattern: str
    router_pattern: str
    correction_bias_pattern: str
    correction_bias_switch: str
    router_transposed: bool
    expert_pattern: str
    expert_w1: str
    expert_w2: str
    expert_w3: str
    expert_fused_w1: str
    expert_fused_w2: str
    expert_gate_up_interleaved: bool
    has_shared_experts: bool
    shared_experts_pattern: str
    shared_expert_w1: str
    shared_expert_w2: str
    shared_expert_w3: str
    shared_experts_gate_pattern: str
    num_experts_attr: SettingRule
    top_k_attr: SettingRule
    score_func: str
    score_apply: str
    route_norm: SettingRule
    route_scale: SettingRule
    num_expert_groups: SettingRule
    num_limited_groups: SettingRule
    moe_layers: LayersWithExperts
    spans: Spans
    mixers: Mixers
    global_layers: Mapping[str, str]
    rope_without_effect: tuple[str, ...]
    rope_alpha: bool
    attributes: Mapping[str, Any]
    aliases: Mapping[str, str]
    require: Mapping[str, Any]
    settings: Mapping[str, SettingRule]
    tensors: Mapping[str, tuple[str, ...]]
    carried: tuple[str, ...]
    carried_layers: SettingRule
    carried_experts: SettingRule
    carried_router_pattern: str
    name: str = ""
    own: Mapping[str, Any] = field(default_factory=dict)


_KINDS = {key: kind for key, kind in get_type_hints(Family).items() if key not in ("name", "own")}
_PATTERNS = tuple(name for name in _KINDS if name.endswith(("_pattern", "_w1", "_w2", "_w3")))
"""Keys whose values are regular expressions."""
_CHOICES = {"score_func": ("softmax", "sigmoid", "sparsemixer"), "score_apply": ("pre", "post")}


def list_families() -> list[str]:
    """List the names of the families that come with the package, sorted."""
    return [name for name in list_names("families") if name != DEFAULTS]


def load_family(given: str) -> Family:
    """Read a family.

    Args:
        given: a name in `configs/families/` or the path of a YAML file.

    Raises:
        UserError: the file cannot be read or has an unknown key or value.
    """
    path = find_file("families", given, "hf_family")
    merged = _merged(path)
    values = {key: _read(path, key, merged.get(key)) for key in _KINDS}
    _check_distinct(path, values["tensors"])
    if values["tensors"].get("block_norm.scale") and not values["mixers"].one_block:
        raise UserError(
            f"{path}: tensors.block_norm.scale is of layers that are one block, and mixers.names "
            "has no experts and no mlp\n"
            "fix: tensors.attention_norm.scale and tensors.mlp_norm.scale"
        )
    if not values["layers"]:
        raise UserError(f"{path}: no layers\nfix: for example model.layers")
    if not values["moe_layer_pattern"]:
        raise UserError(
            f"{path}: no moe_layer_pattern\nfix: for example model\\.layers\\.\\d+\\.mlp"
        )
    return Family(**values, name=path.stem, own=read_mapping(path))


def _check_distinct(path: Path, tensors: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse two parameters whose tensors have one name."""
    roles: dict[tuple[bool, str], str] = {}
    for role, name in ((role, name) for role, names in tensors.items() for name in names):
        if (other := roles.setdefault((role.startswith(OUTSIDE), name), role)) != role:
            raise UserError(
                f"{path}: tensors.{other} and tensors.{role} are both {shown(name)}\n"
                "fix: one name each; attention.query_key_value and mlp.gate_up are several in one"
            )


def choose_family(config: Mapping[str, Any], where: Path) -> Family:
    """Choose the family that a `config.json` names, by `model_type`, else by `architectures`.

    Where several have its `model_type`, its `architectures` choose among them.

    Args:
        config: the file's content.
        where: the file, for messages.

    Raises:
        UserError: it names none, or several.
    """
    families = [_shipped(name) for name in list_families()]
    model_type, named = config.get("model_type"), config.get("architectures")
    architectures = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    found = [family for family in families if model_type in family.model_type]
    if len(found) != 1:
        named_so = [
            one for one in found or families if any(a in one.architectures for a in architectures)
        ]
        found = named_so or found
    if len(found) == 1:
        return found[0]
    what = f"{where}: model_type={in_json(model_type)}, architectures={in_json(named)}"
    if found:
        names = " or ".join(f"hf_family={family.name}" for family in found)
        raise UserError(f"{what}: several families match\nfix: {names}")
    raise UserError(
        f"{what}: no family of configs/families matches\n"
        f"fix: hf_family=FILE.yml of your own, or one of {', '.join(list_families())}"
    )


@functools.cache
def _shipped(name: str) -> Family:
    return load_family(name)


def _merged(path: Path) -> dict[str, Any]:
    """Lay a family's file over those that it is based on; `defaults.yml` is the last."""
    chain = [path]
    contents = [_checked(path)]
    while chain[-1] != configs_dir() / "families" / f"{DEFAULTS}.yml":
        base = contents[-1].pop("based_on", DEFAULTS)
        if not isinstance(base, str) or len(chain) == _MOST_BASES:
            raise UserError(f"{chain[-1]}: based_on={shown(base)}\nfix: the name of a family")
        chain.append(find_file("families", base, "based_on"))
        contents.append(_checked(chain[-1]))
    files = [*zip(chain, contents, strict=True)][::-1]
    # A rule's entries belong together: they replace those of a base.
    return lay_families(files, lambda key: _KINDS[key] is not SettingRule)


def _checked(path: Path) -> dict[str, Any]:
    content = read_mapping(path)
    for key in content:
        check_known(path, "", key, [*_KINDS, "based_on"])
    return content


def _read(path: Path, key: str, value: Any) -> Any:
    """Convert one key's value to the type in `Family`."""

    def wrong(what: str) -> UserError:
        return UserError(
            f"{path}: {key}={shown(value)} is not {what}\nfix: as in configs/families/defaults.yml"
        )

    kind = _KINDS[key]
    if kind is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if kind is SettingRule:
        # Null means none, as in AutoEP.
        return read_rule(path, key, -1 if value is None else value)
    if kind is str:
        text = "" if value is None else value
        if not isinstance(text, str) or text not in _CHOICES.get(key, (text,)):
            raise wrong(f"one of {', '.join(_CHOICES[key])}" if key in _CHOICES else "text")
        if key in _PATTERNS:
            _check_pattern(path, key, text)
        return text
    if kind == tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise wrong("a name or a list of names")
        if key == "carried":
            for text in texts:
                _check_pattern(path, key, text)
        return tuple(texts)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise wrong("a mapping")
    if kind in (LayersWithExperts, Spans, Mixers):
        usual = {each.name: getattr(kind(), each.name) for each in fields(kind)}
        for name, each in value.items():
            check_known(path, f"{key}.", name, usual)
            if type(each) is not (list if isinstance(usual[name], tuple) else type(usual[name])):
                raise wrong("a mapping to attributes")
        if kind is Mixers:
            for name in (value.get("otherwise"), *value.get("names", {}).values()):
                if name not in (None, *get_args(MixerName), *_BLOCKS):
                    known = ", ".join((*get_args(MixerName), *_BLOCKS))
                    raise wrong(f"a mapping to mixers ({shown(name)} is none of {known})")
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in value.items()})
    if key == "settings":
        for name in value:
            check_known(path, f"{key}.", name, base_settings())
        rules = {name: read_rule(path, name, each) for name, each in value.items()}
        for name, rule in rules.items():
            kind = type(base_settings()[name])
            is_number = kind is float and type(rule.default) is int
            if not rule.sources and type(rule.default) is not kind and not is_number:
                raise UserError(
                    f"{path}: settings.{name}={shown(rule.default)} is not {TYPES_IN_WORDS[kind]}\n"
                    "fix: a value as in configs/base.yml, or the name of an attribute"
                )
        return rules
    if key == "tensors":
        for name in value:
            check_known(path, f"{key}.", name, _default_tensors())
        value = {role: [name] if isinstance(name, str) else name for role, name in value.items()}
        if not all(isinstance(each, list) for each in value.values()):
            raise wrong("a mapping to names or lists of them")
        value = {role: tuple(name for name in names if name) for role, names in value.items()}
    texts = sum(value.values(), ()) if key == "tensors" else value.values()
    if key in ("tensors", "aliases", "global_layers") and not all(
        isinstance(text, str) for text in texts
    ):
        raise wrong("a mapping to names")
    return value


@functools.cache
def _default_tensors() -> dict[str, str]:
    """Return the parameters whose tensors a family may name: those of `defaults.yml`."""
    content = read_mapping(configs_dir() / "families" / f"{DEFAULTS}.yml")
    tensors: dict[str, str] = content["tensors"]
    return tensors


def _check_pattern(path: Path, key: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise UserError(
            f"{path}: {key}={shown(text)} is not a regular expression: {error}\n"
            "fix: a dot of a name is written \\., a number \\d+"
        ) from error
