"""Record what transformers writes, for tests that run without it.

    python -m tests.autoep.record      (with transformers and torch installed)

`classes/<family>.json` is a configuration class without arguments. `small/<family>.json` holds
small models: `config.json`, and the names and shapes of the tensors as `save_pretrained` writes
them, with stacked experts and, where the family has that form, with experts one by one.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "hidden_size": 24,
    "vocab_size": 40,
    "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
}
HEADS = {
    "hidden_size": 24,
    "vocab_size": 40,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, list[dict[str, Any]]] = {
    "mixtral": [
        {**HEADS, "num_hidden_layers": 2, "num_local_experts": 4},
        {
            **HEADS,
            "num_hidden_layers": 1,
            "head_dim": 10,
            "sliding_window": 5,
            "tie_word_embeddings": True,
        },
    ],
    "qwen2_moe": [
        {
            **HEADS,
            "num_hidden_layers": 6,
            "num_experts": 4,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 3,
        },
        {
            **HEADS,
            "num_hidden_layers": 2,
            "num_experts": 4,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 16,
            "qkv_bias": False,
        },
    ],
    "qwen3_moe": [
        {
            **HEADS,
            "num_hidden_layers": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "head_dim": 8,
            "norm_topk_prob": True,
        },
        {
            **HEADS,
            "num_hidden_layers": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "mlp_only_layers": [0],
        },
    ],
    "olmoe": [
        {
            **HEADS,
            "num_hidden_layers": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "clip_qkv": 0.5,
        },
        {
            **HEADS,
            "num_hidden_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": True,
        },
    ],
    "deepseek_v2": [
        {
            **MLA,
            "num_hidden_layers": 3,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "num_experts_per_tok": 2,
        },
        {
            **MLA,
            "num_hidden_layers": 1,
            "q_lora_rank": 14,
            "attention_bias": True,
            "num_experts_per_tok": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 16.0,
        },
    ],
    "deepseek_v3": [
        {
            **MLA,
            "num_hidden_layers": 3,
            "q_lora_rank": 14,
            "first_k_dense_replace": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
        },
        {
            **MLA,
            "num_hidden_layers": 2,
            "q_lora_rank": None,
            "attention_bias": True,
            "first_k_dense_replace": 0,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "tie_word_embeddings": True,
            "rope_interleave": False,
        },
    ],
    "gpt_oss": [
        {
            **HEADS,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
        },
        {
            **HEADS,
            "num_hidden_layers": 3,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ],
    "llama4_text": [
        {
            **HEADS,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "intermediate_size_mlp": 28,
            "head_dim": 8,
            "interleave_moe_layer_step": 2,
        },
        {
            **HEADS,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "intermediate_size_mlp": 28,
            "head_dim": 8,
            "attention_bias": True,
            "moe_layers": [0],
            "no_rope_layer_interval": 2,
            "attention_chunk_size": None,
            "use_qk_norm": False,
        },
    ],
    "granitemoe": [
        {**HEADS, "num_hidden_layers": 2, "num_local_experts": 4},
        {
            **HEADS,
            "num_hidden_layers": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "logits_scaling": 6.0,
        },
    ],
    "phimoe": [
        {
            **HEADS,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "attention_bias": True,
            "lm_head_bias": True,
        },
        {
            **HEADS,
            "num_hidden_layers": 1,
            "num_local_experts": 4,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2],
                "long_factor": [1.5, 2.0, 4.0],
                "short_mscale": 1.25,
                "long_mscale": 1.25,
                "original_max_position_embeddings": 4096,
            },
        },
    ],
    "glm4_moe": [
        {
            **HEADS,
            "num_hidden_layers": 3,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "head_dim": 8,
            "use_qk_norm": True,
            "attention_bias": True,
        },
        {
            **HEADS,
            "num_hidden_layers": 3,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "head_dim": 8,
            "first_k_dense_replace": 2,
            "n_shared_experts": 2,
        },
    ],
    "ernie4_5_moe": [
        {
            **HEADS,
            "num_hidden_layers": 3,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 12,
        },
        {
            **HEADS,
            "num_hidden_layers": 4,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 12,
            "moe_layer_start_index": 0,
            "moe_layer_interval": 2,
            "moe_num_shared_experts": 0,
            "tie_word_embeddings": False,
        },
    ],
}


NEWER = (
    *("dots1", "exaone_moe", "flex_olmo", "glm4_moe_lite", "glm4v_moe", "granitemoeshared"),
    *("hunyuan_v1_moe", "kimi_k25", "minimax_m2", "qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    *("qwen3_vl_moe", "sarvam_mla", "sarvam_moe", "solar_open", "deepseek_v32", "glm_moe_dsa"),
    *("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "ernie4_5_vl_moe", "gemma4", "gemma4_text"),
)
"""Families of which only the class is recorded: `tests/parity` reads whole models of theirs."""


def saved(model: Any, **options: Any) -> dict[str, list[int]]:
    """Return the names and shapes of the tensors that a model saves."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


def main() -> None:
    """Write the files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for family in (*MODELS, *NEWER):
        plain = AutoConfig.for_model(family).to_dict()
        (HERE / "classes" / f"{family}.json").write_text(json.dumps(plain, indent=1) + "\n")
    for family, arguments in MODELS.items():
        models = []
        for each in arguments:
            config = AutoConfig.for_model(family, pad_token_id=0, **each)
            model = AutoModelForCausalLM.from_config(config)
            models.append(
                {
                    "config": json.loads(model.config.to_json_string(use_diff=True)),
                    "saved": saved(model),
                    "stacked": saved(model, save_original_format=False),
                }
            )
        lines = ",\n".join(json.dumps(model) for model in models)
        (HERE / "small" / f"{family}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
