"""List what published models' config.json has other than their families' defaults.

The numbers are those on Hugging Face; `tests/autoep/published.py` has whole files, and tensors, of
other models.
"""

from __future__ import annotations

from typing import Any


def yarn(factor: float, fast: float) -> dict[str, Any]:
    return {
        "beta_fast": fast,
        "beta_slow": 1,
        "factor": factor,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }


def every(layers: int, attention: set[int], other: str, name: str) -> list[str]:
    return [name if layer in attention else other for layer in range(layers)]


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek3.2-671b": ("deepseek_v32", {"rope_scaling": yarn(40, 32)}),
    "dots1-142b-a14b": (
        "dots1",
        {
            "first_k_dense_replace": 1, "hidden_size": 4096, "head_dim": 128,
            "max_position_embeddings": 32768, "n_routed_experts": 128, "n_shared_experts": 2,
            "norm_topk_prob": True, "num_experts_per_tok": 6, "rms_norm_eps": 1e-05,
            "rope_theta": 10000000, "routed_scaling_factor": 2.5, "sliding_window": None,
        },
    ),
    "ernie4.5-21b-a3b": ("ernie4_5_moe", {"moe_layer_end_index": 27}),
    "flex-olmo-7x7b": ("flex_olmo", {}),
    "gemma4-26b-a4b": (
        "gemma4_text",
        {
            "attention_k_eq_v": True, "enable_moe_block": True, "final_logit_softcapping": 30.0,
            "hidden_size": 2816, "hidden_size_per_layer_input": 0, "intermediate_size": 2112,
            "moe_intermediate_size": 704, "num_attention_heads": 16, "num_experts": 128,
            "num_global_key_value_heads": 2, "num_key_value_heads": 8, "sliding_window": 1024,
            "top_k_experts": 8, "use_bidirectional_attention": "vision",
        },
    ),
    "glm4.7-flash": ("glm4_moe_lite", {"rope_theta": 1000000}),
    "glm5-744b-a40b": ("glm_moe_dsa", {"rope_theta": 1000000}),
    "gpt-oss-120b": ("gpt_oss", {"num_hidden_layers": 36, "num_local_experts": 128}),
    "granite3-1b-a400m": (
        "granitemoe",
        {
            "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_size": 1024,
            "intermediate_size": 512, "logits_scaling": 6.0, "max_position_embeddings": 4096,
            "num_attention_heads": 16, "num_experts_per_tok": 8, "num_hidden_layers": 24,
            "num_key_value_heads": 8, "num_local_experts": 32, "residual_multiplier": 0.22,
            "tie_word_embeddings": True, "vocab_size": 49155,
        },
    ),
    "granite4-h-small": (
        "granitemoehybrid",
        {
            "attention_multiplier": 0.0078125, "embedding_multiplier": 12, "hidden_size": 4096,
            "intermediate_size": 768,
            "layer_types": every(40, {5, 15, 25, 35}, "mamba", "attention"),
            "logits_scaling": 16, "mamba_d_head": 64, "mamba_d_state": 128,
            "max_position_embeddings": 131072, "num_attention_heads": 32,
            "num_experts_per_tok": 10, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "num_local_experts": 72, "position_embedding_type": "nope",
            "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "shared_intermediate_size": 1536,
            "tie_word_embeddings": True, "vocab_size": 100352,
        },
    ),
    "hunyuan-80b-a13b": (
        "hunyuan_v1_moe",
        {
            "head_dim": 128, "intermediate_size": 3072, "max_position_embeddings": 32768,
            "moe_topk": 8, "num_experts": 64, "num_key_value_heads": 8,
            "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
            "tie_word_embeddings": True, "vocab_size": 128167,
        },
    ),
    "k-exaone-236b-a23b": (
        "exaone_moe",
        {
            "head_dim": 128, "hidden_size": 6144, "intermediate_size": 18432,
            "max_position_embeddings": 262144, "moe_intermediate_size": 2048, "num_experts": 128,
            "num_attention_heads": 64, "num_hidden_layers": 48, "num_key_value_heads": 8,
            "rope_theta": 1000000, "sliding_window": 128, "vocab_size": 153600,
        },
    ),
    "kimi-k2-1t": (
        "deepseek_v3",
        {
            "first_k_dense_replace": 1, "max_position_embeddings": 131072, "n_group": 1,
            "n_routed_experts": 384, "num_attention_heads": 64,
            "rope_scaling": yarn(32, 1), "rope_theta": 50000.0,
            "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840,
        },
    ),
    "lfm2-8b-a1b": (
        "lfm2_moe",
        {
            "layer_types": every(24, {2, 6, 10, 14, 18, 21}, "conv", "full_attention"),
            "num_hidden_layers": 24,
        },
    ),
    "ling-mini-2.0": ("bailing_moe_v2", {"routed_scaling_factor": 2.5}),
    "minimax-m2": ("minimax_m2", {"rotary_dim": 64, "scoring_func": "sigmoid"}),
    "mixtral-8x22b": (
        "mixtral",
        {
            "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536,
            "num_attention_heads": 48, "num_hidden_layers": 56, "rope_theta": 1000000,
            "sliding_window": None, "vocab_size": 32768,
        },
    ),
    "nemotron3-nano-30b-a3b": (
        "nemotron_h",
        {
            "hidden_size": 2688,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "intermediate_size": 1856, "mamba_num_heads": 64, "max_position_embeddings": 262144,
            "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712,
            "n_routed_experts": 128, "num_experts_per_tok": 6, "num_key_value_heads": 2,
            "routed_scaling_factor": 2.5,
        },
    ),
    "phi3.5-moe": (
        "phimoe",
        {
            "attention_bias": True, "lm_head_bias": True,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0, "sliding_window": 131072,
        },
    ),
    "qwen1.5-moe-a2.7b": (
        "qwen2_moe",
        {"max_position_embeddings": 8192, "rope_theta": 1000000.0},
    ),
    "qwen3-235b-a22b": (
        "qwen3_moe",
        {
            "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288,
            "max_position_embeddings": 40960, "moe_intermediate_size": 1536,
            "norm_topk_prob": True, "num_attention_heads": 64, "num_hidden_layers": 94,
            "rope_theta": 1000000.0,
        },
    ),
    "qwen3-next-80b-a3b": (
        "qwen3_next",
        {"intermediate_size": 5120, "rope_theta": 10000000},
    ),
    "qwen3.5-35b-a3b": (
        "qwen3_5_moe_text",
        {
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default"
            },
        },
    ),
    "sarvam-105b": ("sarvam_mla", {}),
    "sarvam-30b": ("sarvam_moe", {}),
    "solar-open-100b": ("solar_open", {}),
}  # fmt: skip
"""Model in configs/models/ -> its family, and what its config.json has other than the default."""

PARAMETERS = {
    "dots1-142b-a14b": 142_774_381_696,
    "granite4-h-small": 32_207_337_984,
    "hunyuan-80b-a13b": 80_393_183_232,
    "kimi-k2-1t": 1_026_408_232_448,
    "lfm2-8b-a1b": 8_339_929_856 + 22 * 32,
    "ling-mini-2.0": 16_255_643_392,
    "nemotron3-nano-30b-a3b": 31_577_937_344 + 23 * 128,
}
"""As the models' pages on Hugging Face have it, with the correction biases that two leave out."""
