"""Check the settings of published models and of unusual configs against values by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_shard.autoep.attributes import Attributes
from moe_shard.autoep.family import choose_family
from moe_shard.autoep.settings import model_settings
from tests.autoep.published import CONFIGS, SCOUT

SPAN_KEYS = (
    *("attention_pattern", "sliding_window_size", "chunk_attn_window_size"),
    "nope_layer_interval",
)


def settings(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the settings from config.json; `...` leaves an attribute out."""
    written = {key: value for key, value in (config | changes).items() if value is not ...}
    where = Path("m/config.json")
    family = choose_family(written, where)
    return model_settings(Attributes(written, family, where), family)


def spans(config: dict[str, Any], **changes: Any) -> tuple[Any, ...]:
    found = settings(config, **changes)
    return tuple(found[key] for key in SPAN_KEYS)


COMMON = {
    "capacity_factor": -1.0,
    "moe_dispatch": "ragged",
    "load_balance_loss_type": "huggingface",
    "mlp_activations": ["silu", "linear"],
    "attention_pattern": ["global"],
    "sliding_window_size": 0,
    "chunk_attn_window_size": 0,
    "nope_layer_interval": -1,
    "nope_layers": [],
    "first_num_dense_layers": 0,
    "interleave_moe_layer_step": 1,
    "dense_layers": [],
    "routed_score_on_input": False,
    "routed_bias": False,
    "routed_scaling_factor": 1.0,
    "n_routing_groups": -1,
    "topk_routing_group": -1,
    "shared_expert_gate": False,
    "rope_type": "default",
    "partial_rotary_factor": 1.0,
}
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen1.5-MoE-A2.7B": {
        "base_emb_dim": 2048,
        "base_num_decoder_layers": 24,
        "base_mlp_dim": 5632,
        "base_moe_mlp_dim": 1408,
        "vocab_size": 151936,
        "base_num_query_heads": 16,
        "base_num_kv_heads": 16,
        "head_dim": -1,
        "attention_bias": True,
        "attention_out_bias": False,
        "max_position_embeddings": 8192,
        "normalization_layer_epsilon": 1e-6,
        "logits_via_embedding": False,
        "load_balance_loss_weight": 0.001,
        "shared_experts": 1,
        "shared_expert_mlp_dim": 5632,
        "shared_expert_gate": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "routed_score_func": "softmax",
        "norm_topk_prob": False,
        "rope_max_timescale": 1000000.0,
    },
    "granite-3.0-1b-a400m-base": {
        "base_emb_dim": 1024,
        "base_num_decoder_layers": 24,
        "base_mlp_dim": 512,
        "base_moe_mlp_dim": 512,
        "vocab_size": 49155,
        "base_num_query_heads": 16,
        "base_num_kv_heads": 8,
        "head_dim": -1,
        "attention_bias": False,
        "attention_out_bias": False,
        "attention_scale": 0.015625,
        "max_position_embeddings": 4096,
        "normalization_layer_epsilon": 1e-6,
        "logits_via_embedding": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "load_balance_loss_weight": 0.001,
        "shared_experts": 0,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "routed_score_func": "softmax",
        "norm_topk_prob": True,
        "rope_max_timescale": 10000.0,
    },
    "Phi-3.5-MoE-instruct": {
        "base_emb_dim": 4096,
        "base_num_decoder_layers": 32,
        "base_mlp_dim": 6400,
        "base_moe_mlp_dim": 6400,
        "vocab_size": 32064,
        "base_num_query_heads": 32,
        "base_num_kv_heads": 8,
        "head_dim": -1,
        "attention_bias": True,
        "attention_out_bias": True,
        "attention_pattern": ["sliding"],
        "sliding_window_size": 131072,
        "max_position_embeddings": 131072,
        "normalization_type": "layer",
        "normalization_layer_epsilon": 1e-5,
        "logits_via_embedding": False,
        "logits_bias": True,
        "load_balance_loss_weight": 0.0,
        "shared_experts": 0,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "routed_score_func": "sparsemixer",
        "sparsemixer_jitter": 0.01,
        "norm_topk_prob": False,
        "rope_type": "longrope",
        "rope_max_timescale": 10000.0,
        "rope_attention_factor": 1.243163121016122,
        "original_max_position_embeddings": 4096,
        "rope_short_factors": [1.0, *[1.5] * 62, 2.25],
        "rope_long_factors": [1.0199999809265137, *[2.0] * 62, 64.05000305175781],
    },
    "ERNIE-4.5-21B-A3B-PT": {
        "base_emb_dim": 2560,
        "base_num_decoder_layers": 28,
        "base_mlp_dim": 12288,
        "base_moe_mlp_dim": 1536,
        "vocab_size": 103424,
        "base_num_query_heads": 20,
        "base_num_kv_heads": 4,
        "head_dim": -1,
        "attention_bias": False,
        "attention_out_bias": False,
        "max_position_embeddings": 131072,
        "normalization_layer_epsilon": 1e-5,
        "logits_via_embedding": True,
        "load_balance_loss_weight": 0.001,
        "first_num_dense_layers": 1,
        "shared_experts": 2,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "routed_score_func": "softmax",
        "routed_bias": True,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "rope_max_timescale": 500000.0,
    },
}


@pytest.mark.parametrize("name", KNOWN)
def test_all_settings_of_models_that_configs_has_not(name: str) -> None:
    assert settings(CONFIGS[name]) == COMMON | KNOWN[name]


QWEN2, QWEN3 = CONFIGS["Qwen1.5-MoE-A2.7B"], CONFIGS["Qwen3-30B-A3B"]
MIXTRAL, OSS = CONFIGS["Mixtral-8x7B-v0.1"], CONFIGS["gpt-oss-20b"]


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (MIXTRAL, {}, (["global"], 0, 0, -1)),
        (MIXTRAL, {"sliding_window": 4096}, (["sliding"], 4096, 0, -1)),
        (QWEN3, {"sliding_window": 7}, (["global"], 0, 0, -1)),
        (QWEN3, {"sliding_window": 7, "use_sliding_window": True}, (["sliding"], 7, 0, -1)),
        (QWEN2, {}, (["global"], 0, 0, -1)),
        (
            QWEN2,
            {"use_sliding_window": True, "num_hidden_layers": 5, "max_window_layers": 3},
            (["sliding", "global", "sliding", "global", "global"], 32768, 0, -1),
        ),
        (
            QWEN2,
            {"use_sliding_window": True, "max_window_layers": 99},
            (["sliding", "global"], 32768, 0, -1),
        ),
        (QWEN2, {"layer_types": ["full_attention"] * 24}, (["global"], 0, 0, -1)),
        (OSS, {}, (["sliding", "global"], 128, 0, -1)),
        (OSS, {"layer_types": ...}, (["sliding", "global"], 128, 0, -1)),
        (
            OSS,
            {"layer_types": ["full_attention", "sliding_attention"] * 12},
            (["global", "sliding"], 128, 0, -1),
        ),
        (SCOUT, {}, (["chunked"] * 3 + ["global"], 0, 8192, 4)),
        (SCOUT, {"no_rope_layers": ...}, (["chunked"] * 3 + ["global"], 0, 8192, 4)),
        (SCOUT, {"no_rope_layers": [1, 0] * 24}, (["chunked", "global"], 0, 8192, 2)),
        (SCOUT, {"no_rope_layers": [1] * 48}, (["chunked"], 0, 8192, -1)),
        (SCOUT, {"attention_chunk_size": None}, (["global"], 0, 0, 4)),
        (SCOUT, {"layer_types": ["full_attention"] * 48}, (["global"], 0, 0, 4)),
        (SCOUT, {"no_rope_layer_interval": 6}, (["chunked"] * 5 + ["global"], 0, 8192, 6)),
    ],
)
def test_what_each_layer_attends_to(
    config: dict[str, Any], changes: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert spans(config, **changes) == expected


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu_exact"),
        ("gelu_pytorch_tanh", "gelu"),
        ("gelu_new", "gelu"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
    ],
)
def test_activations(act: str, expected: str) -> None:
    assert settings(MIXTRAL, hidden_act=act)["mlp_activations"] == [expected, "linear"]


def test_gpt_oss_has_an_activation_of_its_own() -> None:
    found = settings(OSS, hidden_act="gelu", swiglu_limit=9.5)
    assert found["mlp_activations"] == ["quick_gelu", "linear"]
    assert (found["mlp_activations_limit"], found["mlp_linear_offset"]) == (9.5, 1.0)


@pytest.mark.parametrize(
    ("method", "expected"), [("greedy", (-1, -1)), ("group_limited_greedy", (8, 3))]
)
def test_groups_of_deepseek_v2(method: str, expected: tuple[int, int]) -> None:
    groups = {"n_group": 8, "topk_group": 3, "norm_topk_prob": True}
    found = settings(CONFIGS["DeepSeek-V2-Lite"], topk_method=method, **groups)
    assert (found["n_routing_groups"], found["topk_routing_group"]) == expected
    assert found["routing_group_score"] == "max"
    # DeepSeek-V2's code reads norm_topk_prob and never uses it.
    assert found["norm_topk_prob"] is False


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": ...}, True),
    ],
)
def test_ernie_is_tied_unless_it_says_otherwise(changes: dict[str, Any], expected: bool) -> None:
    found = settings(CONFIGS["ERNIE-4.5-21B-A3B-PT"], **changes)
    assert found["logits_via_embedding"] is expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moe_layer_end_index": -1}, (1, 1, [])),
        ({"moe_layer_end_index": 26}, (1, 1, [27])),
        ({"moe_layer_end_index": 26, "moe_layer_interval": 3}, (0, 3, [])),
        ({"moe_layer_start_index": 0}, (0, 1, [])),
    ],
)
def test_layers_with_experts(changes: dict[str, Any], expected: Any) -> None:
    found = settings(CONFIGS["ERNIE-4.5-21B-A3B-PT"], **changes)
    keys = ("first_num_dense_layers", "interleave_moe_layer_step", "dense_layers")
    assert tuple(found[key] for key in keys) == expected
