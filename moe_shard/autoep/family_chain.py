"""Lay a family's file over those that it is based on, so that nothing it says is lost.

Some settings are also said by keys of their own, as those of DeepSpeed's AutoEP, or are found in
`config.json` layer by layer. The file that is nearer to the model decides; one that says a thing
twice is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.errors import UserError

EXPERT_LAYERS = ("first_num_dense_layers", "interleave_moe_layer_step", "dense_layers")
"""Settings that state together which layers have experts; one of them replaces `moe_layers`."""

SAID_BY: Mapping[str, tuple[str, ...]] = {
    "num_experts": ("num_experts_attr",),
    "num_experts_per_tok": ("top_k_attr",),
    "routed_score_func": ("score_func",),
    "routed_score_on_input": ("score_apply",),
    "routed_bias": ("correction_bias_pattern",),
    "norm_topk_prob": ("route_norm",),
    "routed_scaling_factor": ("route_scale",),
    "n_routing_groups": ("num_expert_groups",),
    "topk_routing_group": ("num_limited_groups",),
    "shared_expert_gate": ("shared_experts_gate_pattern",),
    **dict.fromkeys(EXPERT_LAYERS, ("moe_layers",)),
    "attention_pattern": (
        *("spans.types", "spans.every", "spans.first", "spans.below", "spans.switch"),
        "spans.full_every",
    ),
    "mixer_pattern": ("mixers",),
    "layers_without_mlp": ("mixers.names",),
    "sliding_window_size": ("spans.window",),
    "chunk_attn_window_size": ("spans.chunk",),
    "nope_layer_interval": ("spans.rope_flags", "spans.nope_interval", "spans.nope_types"),
    "nope_layers": ("spans.rope_flags", "spans.nope_interval", "spans.nope_types"),
    "rope_max_timescale": ("attributes.rope_theta",),
    "partial_rotary_factor": ("attributes.partial_rotary_factor",),
}
"""Setting -> the other keys that say it; a dot leads to an entry of a key."""

_SHARED = ("shared_experts", "shared_expert_gate")
_OF_THE_COMMAND = {
    "load_parameters_path": "the directory that is read",
    "hf_family": "this file",
    "weights_outside_directory": "for the command to say",
}
"""Settings that the command has said when a family's file is read -> what they are."""


def lay_families(
    files: Sequence[tuple[Path, dict[str, Any]]], adds: Callable[[str], bool]
) -> dict[str, Any]:
    """Lay files over each other.

    Args:
        files: path and content of each, from the last base to the family itself.
        adds: whether entries are added to a key's mapping; else it is replaced, as all others are.

    Raises:
        UserError: a file says one thing twice, or what has no effect beside the rest.
    """
    merged: dict[str, Any] = {}
    for path, content in files:
        own = _settings(content)
        for name, keys in SAID_BY.items():
            said = next((key for key in keys if _has(content, key)), "")
            if said and name in own:
                raise UserError(
                    f"{path}: settings.{name} and {said} say one thing\nfix: keep one of the two"
                )
            if said:
                _settings(merged).pop(name, None)
        if content.get("has_shared_experts") is False:
            _settings(merged).pop("shared_experts", None)
        for key, value in content.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merged[key] | value if both and adds(key) else value
    _check_effect(*files[-1], merged)
    return merged


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file, which is not checked yet."""
    found = content.get("settings")
    return found if isinstance(found, dict) else {}


def _has(content: Mapping[str, Any], key: str) -> bool:
    """Return whether a file says something of a key, or of an entry of one."""
    name, _, entry = key.partition(".")
    value = content.get(name)
    if entry:
        return isinstance(value, dict) and entry in value
    return name in content and value != {}


def _check_effect(path: Path, content: Mapping[str, Any], merged: Mapping[str, Any]) -> None:
    """Refuse what a family says to no effect.

    Args:
        path: its file.
        content: what the file itself says.
        merged: what it says with its bases.
    """

    def refuse(key: str, why: str, fix: str) -> None:
        raise UserError(f"{path}: {key} has no effect: {why}\nfix: {fix}")

    for name, what in _OF_THE_COMMAND.items():
        if name in _settings(content):
            refuse(f"settings.{name}", f"it is {what}", "leave it out")
    if not merged.get("has_shared_experts"):
        shared = [key for key in content if key.startswith("shared_expert")]
        shared += [f"settings.{key}" for key in _settings(content) if key in _SHARED]
        for key in shared:
            refuse(key, "has_shared_experts is false", "has_shared_experts: true, or leave it out")
    if not merged.get("expert_w3"):
        for key in ("expert_fused_w1", "expert_fused_w2"):
            if content.get(key):
                why = "without expert_w3, expert_w1 and expert_w2 name fused tensors too"
                refuse(key, why, f"{key.replace('_fused', '')}: {shown(content[key])}")
