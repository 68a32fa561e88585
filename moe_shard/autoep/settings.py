"""Translate a model's attributes to the keys of `configs/base.yml`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moe_shard.autoep.attributes import Attributes
from moe_shard.autoep.family import Family
from moe_shard.autoep.family_chain import EXPERT_LAYERS
from moe_shard.autoep.mtp_layers import MTP_KEY
from moe_shard.autoep.rope_settings import rope_settings
from moe_shard.autoep.setting_rule import SettingRule
from moe_shard.config.model_config import MOST_LAYERS

_SPANS = {
    "full_attention": "global",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}
"""Name in `layer_types` -> name in `attention_pattern`."""
_LAYERS = "base_num_decoder_layers"
_MLP_TYPES = ("dense", "sparse")
_WITHOUT_ROPE = ("nope_layer_interval", "nope_layers")
"""Settings that state together which layers have no RoPE."""


def model_settings(
    attributes: Attributes, family: Family, ahead: int | None = None
) -> dict[str, Any]:
    """Return the settings of the model, by key of `base.yml`.

    What the family's settings say is laid over what is found layer by layer or among positions.

    Args:
        attributes: the model's attributes.
        family: states where each setting is found.
        ahead: layers of multi-token prediction; None: as the family's settings say, else none.

    Raises:
        UserError: an attribute is missing, has another type, or is not supported.
    """
    settings = {key: attributes.value(key, rule) for key, rule in setting_rules(family).items()}
    if ahead is not None and (ahead or MTP_KEY in settings):
        settings[MTP_KEY] = ahead
    layers = settings[_LAYERS]
    if layers > MOST_LAYERS:
        written = attributes.rule_text(_LAYERS, setting_rules(family)[_LAYERS])
        raise attributes.error(f"{written} is out of range", f"at most {MOST_LAYERS} layers")
    found = _spans(attributes, family, layers, settings.get("attention_pattern"))
    mixers = _mixers(attributes, family, layers)
    found |= mixers
    if "dense_layers" not in mixers and not {*EXPERT_LAYERS} & family.settings.keys():
        found |= _expert_layers(attributes, family, layers)
    if {*_WITHOUT_ROPE} & family.settings.keys():
        found = {key: value for key, value in found.items() if key not in _WITHOUT_ROPE}
    rope = rope_settings(
        attributes,
        latent=settings.get("attention_type") == "mla",
        without_effect=family.rope_without_effect,
        alpha=family.rope_alpha,
    )
    if settings.get("rope_type", rope["rope_type"]) != rope["rope_type"]:
        # How config.json stretches positions means nothing to another way of doing it.
        rope = {key: rope[key] for key in ("rope_max_timescale", "partial_rotary_factor")}
    return found | rope | settings


def setting_rules(family: Family) -> dict[str, SettingRule]:
    """Return the rule of every setting that is one attribute or value, like AutoEP's keys."""
    rules = {
        "num_experts": family.num_experts_attr,
        "num_experts_per_tok": family.top_k_attr,
        "routed_score_func": SettingRule(default=family.score_func),
        "routed_score_on_input": SettingRule(default=family.score_apply == "pre"),
        "routed_bias": _correction_bias(family),
        "norm_topk_prob": family.route_norm,
        "routed_scaling_factor": family.route_scale,
        "n_routing_groups": family.num_expert_groups,
        "topk_routing_group": family.num_limited_groups,
        "shared_expert_gate": SettingRule(default=bool(family.shared_experts_gate_pattern)),
    }
    if not family.has_shared_experts:
        rules["shared_experts"] = SettingRule(default=0)
        rules["shared_expert_gate"] = SettingRule(default=False)
    return {**rules, **family.settings}


def _correction_bias(family: Family) -> SettingRule:
    """Return whether there is a bias for the choice of experts."""
    if family.correction_bias_pattern and (switch := family.correction_bias_switch):
        return SettingRule(sources=(switch,), default=True)
    return SettingRule(default=bool(family.correction_bias_pattern))


def _mixers(attributes: Attributes, family: Family, layers: int) -> dict[str, Any]:
    """Return the keys that state what mixes the tokens of each layer; none where all attend.

    Where a layer is one block, they also state which layers have experts.
    """
    at = family.mixers
    types = attributes.names(at.types, layers, at.names)
    if types is not None:
        mixers = [at.names[name] for name in types]
    elif attributes.get(at.full_every) is not None:
        every = max(attributes.number(at.full_every, 1), 1)
        whole = [(layer + 1) % every == 0 for layer in range(layers)]
        mixers = ["attention" if is_whole else at.otherwise for is_whole in whole]
    else:
        mixers = [at.otherwise] * layers
    if not at.one_block:
        return {} if {*mixers} == {"attention"} else {"mixer_pattern": _shortest(mixers)}
    blocks = [mixer in ("experts", "mlp") for mixer in mixers]
    both = [*zip(mixers, blocks, strict=True)]
    return {
        "mixer_pattern": _shortest(["none" if block else mixer for mixer, block in both]),
        "layers_without_mlp": [layer for layer, block in enumerate(blocks) if not block],
        **dict(zip(EXPERT_LAYERS, (0, 1), strict=False)),
        "dense_layers": [layer for layer, mixer in enumerate(mixers) if mixer == "mlp"],
    }


def _expert_layers(attributes: Attributes, family: Family, layers: int) -> dict[str, Any]:
    """Return the keys that state which layers have experts."""
    at = family.moe_layers
    numbers = attributes.numbers(at.list)
    types = attributes.names(at.types, layers, _MLP_TYPES)
    if numbers is None and types is not None:
        numbers = [layer for layer, name in enumerate(types) if name == "sparse"]
    elif numbers is None:
        first, last = attributes.number(at.first, 0), attributes.number(at.last, -1)
        last = layers - 1 if last == -1 else last
        step = max(attributes.number(at.step, 1), 1)
        excluded = set(attributes.numbers(at.excluded) or [])
        numbers = [
            layer
            for layer in range(max(first, 0), min(last + 1, layers))
            if (layer + 1) % step == 0 and layer not in excluded
        ]
    elif any(number >= layers for number in numbers):
        raise attributes.error(
            f"{attributes.as_text(at.list)} of {layers} layers", f"numbers below {layers}"
        )
    if not numbers:
        names = [name for name in (at.list, at.types, at.first, at.last, at.step) if name]
        raise attributes.error(
            f"no layer has experts: {', '.join(map(attributes.as_text, names))}",
            "a model with experts",
        )
    # Prefer the description with fewer exceptions; of equals, the one without a step.
    ways = [_with_step(numbers, layers, step) for step in (1, math.gcd(*(n + 1 for n in numbers)))]
    return min(ways, key=lambda way: len(way["dense_layers"]))


def _with_step(numbers: Sequence[int], layers: int, step: int) -> dict[str, Any]:
    """Return those keys if the last of every `step` layers has experts, with exceptions."""
    first = min(numbers) if min(numbers) >= step else 0
    have = set(numbers)
    regular = [layer for layer in range(first, layers) if (layer + 1) % step == 0]
    return {
        "first_num_dense_layers": first,
        "interleave_moe_layer_step": step,
        "dense_layers": [layer for layer in regular if layer not in have],
    }


def _spans(
    attributes: Attributes, family: Family, layers: int, pattern: list[str] | None
) -> dict[str, Any]:
    """Return the keys that state what each layer attends to and which layers have RoPE.

    Args:
        attributes: the model's attributes.
        family: names those that are read.
        layers: number of layers.
        pattern: the layers' spans as the family's settings have them; None: as found.
    """
    at = family.spans
    flags = _rope_flags(attributes, family, layers)
    window, chunk = (_tokens(attributes, name) for name in (at.window, at.chunk))
    if at.switch and not attributes.get(at.switch):
        window = 0
    types = attributes.names(at.types, layers, _SPANS)
    if types is not None:
        spans = [_SPANS[name] for name in types]
    elif window and attributes.get(at.full_every) is not None:
        every = attributes.number(at.full_every, 1)
        spans = ["global" if (n + 1) % max(every, 1) == 0 else "sliding" for n in range(layers)]
    else:
        first, below = attributes.number(at.first, 0), attributes.number(at.below, layers)
        spans = ["global"] * layers
        for layer, rope in enumerate(flags):
            if window and layer % at.every == 0 and first <= layer < below:
                spans[layer] = "sliding"
            elif chunk and rope:
                spans[layer] = "chunked"
    if at.last and pattern is None and spans[-1] != at.last:
        raise attributes.error(
            f"{attributes.as_text(at.types)}: the last of {layers} layers is {spans[-1]}, where "
            f"this family has {at.last}",
            f"a model whose last layer is {at.last}, or its first layers up to such a one",
        )
    if window:
        without = {_SPANS[name] for name in at.nope_types}
        flags = [rope and span not in without for rope, span in zip(flags, spans, strict=True)]
    interval = _nope_interval(flags)
    spans = _shortest(spans) if pattern is None else pattern
    return {
        "attention_pattern": spans,
        "sliding_window_size": window if "sliding" in spans else 0,
        "chunk_attn_window_size": chunk if "chunked" in spans else 0,
        "nope_layer_interval": -1 if interval is None else interval,
        "nope_layers": [layer for layer, rope in enumerate(flags) if not rope and interval is None],
    }


def _tokens(attributes: Attributes, name: str) -> int:
    """Return the length of a window or a chunk, 0 where there is none."""
    tokens = attributes.number(name, 0)
    if tokens < 0:
        what = f"{attributes.as_text(name)} is not a number of tokens"
        raise attributes.error(what, "null where no layer has one")
    return tokens


def _rope_flags(attributes: Attributes, family: Family, layers: int) -> list[bool]:
    """Return whether each layer has RoPE."""
    at = family.spans
    flags = attributes.numbers(at.rope_flags)
    if flags:
        if len(flags) != layers:
            raise attributes.error(
                f"{attributes.as_text(at.rope_flags)} has {len(flags)} entries for {layers} layers",
                "one for each layer",
            )
        return [bool(flag) for flag in flags]
    interval = attributes.number(at.nope_interval, -1)
    return [interval < 1 or (layer + 1) % interval != 0 for layer in range(layers)]


def _nope_interval(flags: Sequence[bool]) -> int | None:
    """Return n if every nth layer lacks RoPE; -1 if none does; None if there is no such n."""
    without = [layer for layer, rope in enumerate(flags) if not rope]
    if not without:
        return -1
    interval = without[0] + 1
    regular = [(layer + 1) % interval != 0 for layer in range(len(flags))]
    return interval if regular == list(flags) else None


def _shortest(names: list[str]) -> list[str]:
    """Return the shortest list whose repetition gives these names."""
    for period in range(1, len(names)):
        if all(name == names[layer % period] for layer, name in enumerate(names)):
            return names[:period]
    return names
