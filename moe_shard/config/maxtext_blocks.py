"""List MaxText's decoder blocks: which can be built here, and which keys each of them reads.

MaxText has one flat configuration and a class for each decoder block, and each class reads only
some of the keys: Mixtral's layers ignore `use_qk_norm` and do not scale attention scores. What is
stated of each block is from reading its layers in release 0.2.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BIASED_CHOICE = ("deepseek3", "deepseek4", "kimi-k2")
"""Prefix of the names of models whose router chooses by biased scores and within groups."""

LLAMA31 = {
    "rope_factor": 8.0,
    "original_max_position_embeddings": 8192,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
}
"""Constants of MaxText's class for the positions of Llama 3.1."""


@dataclass(frozen=True)
class Block:
    """Describe a decoder block.

    Attributes:
        has_experts: whether its layers have routed experts; other blocks have one MLP whatever
            `num_experts` is.
        scales: whether scores are divided by the root of a key's size; if not, queries are
            initialised smaller.
        reads: the keys of `OPTIONAL` that it reads.
    """

    has_experts: bool = False
    scales: bool = True
    reads: frozenset[str] = frozenset()


OPTIONAL: Mapping[str, Any] = {
    "attention_bias": False,
    "attn_logits_soft_cap": 0.0,
    "use_qk_norm": False,
    "temperature_tuning": False,
    "nope_layer_interval": -1,
    "interleave_moe_layer_step": 1,
    "first_num_dense_layers": 0,
    "shared_experts": 0,
    "routed_scaling_factor": 1.0,
    "routed_bias_update_rate": 0.0,
    "mlp_activations_limit": -1.0,
    "sliding_window_size": 0,
    "chunk_attn_window_size": 0,
    "partial_rotary_factor": 1.0,
    "global_head_dim": 0,
    "global_num_kv_heads": 0,
    "share_kv_projections": False,
    "local_rope_max_timescale": -1.0,
}
"""Keys that only some blocks read, and their values in blocks that do not."""

_DEEPSEEK = frozenset(
    (
        *("attn_logits_soft_cap", "first_num_dense_layers", "shared_experts"),
        *("routed_scaling_factor", "routed_bias_update_rate", "mlp_activations_limit"),
    )
)
_LLAMA4 = frozenset(
    (
        *("use_qk_norm", "temperature_tuning", "nope_layer_interval", "interleave_moe_layer_step"),
        *("shared_experts", "chunk_attn_window_size"),
    )
)
_GPT_OSS = frozenset(("attention_bias", "mlp_activations_limit", "sliding_window_size"))

BLOCKS: Mapping[str, Block] = {
    "llama2": Block(scales=False, reads=frozenset({"attn_logits_soft_cap"})),
    "mistral": Block(scales=False),
    "mixtral": Block(has_experts=True, scales=False),
    "qwen2": Block(reads=frozenset({"attention_bias", "use_qk_norm"})),
    "qwen3": Block(reads=frozenset({"use_qk_norm"})),
    "qwen3_moe": Block(has_experts=True, reads=frozenset({"use_qk_norm"})),
    "deepseek": Block(has_experts=True, reads=_DEEPSEEK),
    "gpt_oss": Block(has_experts=True, reads=_GPT_OSS),
    "llama4": Block(has_experts=True, reads=_LLAMA4),
}
"""The decoder blocks that can be built here."""

FOR_LOOKING_AT = frozenset(OPTIONAL) - {"routed_bias_update_rate"}
"""Keys that are read for a block that cannot be built, so that its shapes can be explained."""

OTHER_BLOCKS: Mapping[str, str] = {
    "default": "attention and MLP side by side",
    "deepseek4": "compressed attention with hyper-connections",
    "envy": "a norm after each MLP",
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma4", "gemma4_small"), "Gemma's layers"),
    "gpt3": "learned positions and LayerNorm",
    "olmo3": "norms after attention and MLP",
    # They get no segment ids. Here a state begins at 0 with each document.
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5"), "gated delta nets whose states pass from document to document"
    ),
    "qwen3_custom_moe": "experts of another width than the model",
    **dict.fromkeys(("simple", "simple_mlp"), "layers without attention"),
}
"""MaxText's other decoder blocks, and what they have that is not built here."""
