"""List published models' config.json and tensors, written family by family.

The numbers are those on Hugging Face, without the keys that do not concern the decoder; the tensors
are named by hand, not by the package's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Shapes = Iterator[tuple[str, list[int]]]

DEEPSEEK = {
    "attention_bias": False,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
}


def yarn(mscale: float) -> dict[str, Any]:
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }


SCOUT = {
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "floor_scale": 8192,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "use_qk_norm": True,
    "vocab_size": 202048,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B-v0.1": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "Qwen1.5-MoE-A2.7B": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "OLMoE-1B-7B-0924": {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
    "DeepSeek-V2-Lite": {
        **DEEPSEEK,
        "architectures": ["DeepseekV2ForCausalLM"],
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "rope_scaling": yarn(0.707),
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "topk_group": 1,
        "topk_method": "greedy",
        "vocab_size": 102400,
    },
    "DeepSeek-V3": {
        **DEEPSEEK,
        "architectures": ["DeepseekV3ForCausalLM"],
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "rope_scaling": yarn(1.0),
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "vocab_size": 129280,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    },
    "Llama-4-Scout-17B-16E": {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": SCOUT,
        "tie_word_embeddings": False,
        "vision_config": {"hidden_size": 1408, "model_type": "llama4_vision_model"},
    },
    "granite-3.0-1b-a400m-base": {
        "architectures": ["GraniteMoeForCausalLM"],
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 512,
        "logits_scaling": 6.0,
        "max_position_embeddings": 4096,
        "model_type": "granitemoe",
        "num_attention_heads": 16,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": True,
        "vocab_size": 49155,
    },
    "Phi-3.5-MoE-instruct": {
        "architectures": ["PhiMoEForCausalLM"],
        "attention_bias": True,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "input_jitter_noise": 0.01,
        "intermediate_size": 6400,
        "lm_head_bias": True,
        "max_position_embeddings": 131072,
        "model_type": "phimoe",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            # Of the 64 published numbers only the first and the last.
            "long_factor": [1.0199999809265137, *[2.0] * 62, 64.05000305175781],
            "long_mscale": 1.243163121016122,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0, *[1.5] * 62, 2.25],
            "short_mscale": 1.243163121016122,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.01,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "GLM-4.5-Air": {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_qk_norm": False,
        "vocab_size": 151552,
    },
    "ERNIE-4.5-21B-A3B-PT": {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "max_position_embeddings": 131072,
        "model_type": "ernie4_5_moe",
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_layer_end_index": 27,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "num_attention_heads": 20,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
        "vocab_size": 103424,
    },
}
"""Name on Hugging Face -> config.json. Those in fp8 or mxfp4 as converted to bfloat16."""


def tensors(model: str) -> dict[str, list[int]]:
    """Return the names and shapes of a published model's tensors."""
    config = CONFIGS[model]
    return dict({"llama4": scout}.get(config["model_type"], plain)(config))


def plain(c: dict[str, Any]) -> Shapes:
    hidden = c["hidden_size"]
    yield "model.embed_tokens.weight", [c["vocab_size"], hidden]
    yield "model.norm.weight", [hidden]
    if c["model_type"] == "phimoe":
        yield "model.norm.bias", [hidden]
        yield "lm_head.bias", [c["vocab_size"]]
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", [c["vocab_size"], hidden]
    extra = c.get("num_nextn_predict_layers", 0)
    for layer in range(c["num_hidden_layers"] + extra):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", [hidden]
            if c["model_type"] == "phimoe":
                yield f"{at}.{norm}.bias", [hidden]
        latent = "kv_lora_rank" in c
        yield from (latents if latent else heads)(f"{at}.self_attn", c)
        yield from BLOCKS[c["model_type"]](at, layer, c)
        if layer >= c["num_hidden_layers"]:
            yield f"{at}.eh_proj.weight", [hidden, 2 * hidden]
            yield f"{at}.enorm.weight", [hidden]
            yield f"{at}.hnorm.weight", [hidden]
            yield f"{at}.embed_tokens.weight", [c["vocab_size"], hidden]
            yield f"{at}.shared_head.norm.weight", [hidden]
            yield f"{at}.shared_head.head.weight", [c["vocab_size"], hidden]


def heads(at: str, c: dict[str, Any]) -> Shapes:
    hidden, size = c["hidden_size"], c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    queries, keys = c["num_attention_heads"] * size, c["num_key_value_heads"] * size
    biased = {
        "qwen2_moe": "qkv",
        "glm4_moe": "qkv",
        "gpt_oss": "qkvo",
        "phimoe": "qkvo",
    }.get(c["model_type"], "")
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"{at}.{name}_proj.weight", [rows, hidden]
        if name in biased:
            yield f"{at}.{name}_proj.bias", [rows]
    yield f"{at}.o_proj.weight", [hidden, queries]
    if "o" in biased:
        yield f"{at}.o_proj.bias", [hidden]
    if c["model_type"] == "qwen3_moe":
        yield f"{at}.q_norm.weight", [size]
        yield f"{at}.k_norm.weight", [size]
    if c["model_type"] == "olmoe":
        yield f"{at}.q_norm.weight", [queries]
        yield f"{at}.k_norm.weight", [keys]
    if c["model_type"] == "gpt_oss":
        yield f"{at}.sinks", [c["num_attention_heads"]]


def latents(at: str, c: dict[str, Any]) -> Shapes:
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    query = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    if c["q_lora_rank"] is None:
        yield f"{at}.q_proj.weight", [heads * query, hidden]
    else:
        yield f"{at}.q_a_proj.weight", [c["q_lora_rank"], hidden]
        yield f"{at}.q_a_layernorm.weight", [c["q_lora_rank"]]
        yield f"{at}.q_b_proj.weight", [heads * query, c["q_lora_rank"]]
    yield f"{at}.kv_a_proj_with_mqa.weight", [rank + c["qk_rope_head_dim"], hidden]
    yield f"{at}.kv_a_layernorm.weight", [rank]
    yield f"{at}.kv_b_proj.weight", [heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), rank]
    yield f"{at}.o_proj.weight", [hidden, heads * c["v_head_dim"]]


def gated(at: str, hidden: int, size: int, names: tuple[str, str, str]) -> Shapes:
    gate, up, down = names
    yield f"{at}.{gate}.weight", [size, hidden]
    yield f"{at}.{up}.weight", [size, hidden]
    yield f"{at}.{down}.weight", [hidden, size]


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def mixtral(at: str, _layer: int, c: dict[str, Any]) -> Shapes:
    hidden, experts = c["hidden_size"], c["num_local_experts"]
    yield f"{at}.block_sparse_moe.gate.weight", [experts, hidden]
    for expert in range(experts):
        name = f"{at}.block_sparse_moe.experts.{expert}"
        yield from gated(name, hidden, c["intermediate_size"], ("w1", "w3", "w2"))


def qwen(at: str, _layer: int, c: dict[str, Any]) -> Shapes:
    hidden = c["hidden_size"]
    size = c["intermediate_size"] if c["model_type"] == "olmoe" else c["moe_intermediate_size"]
    yield f"{at}.mlp.gate.weight", [c["num_experts"], hidden]
    for expert in range(c["num_experts"]):
        yield from gated(f"{at}.mlp.experts.{expert}", hidden, size, PROJECTIONS)
    if "shared_expert_intermediate_size" in c:
        size = c["shared_expert_intermediate_size"]
        yield from gated(f"{at}.mlp.shared_expert", hidden, size, PROJECTIONS)
        yield f"{at}.mlp.shared_expert_gate.weight", [1, hidden]


def deepseek(at: str, layer: int, c: dict[str, Any]) -> Shapes:
    hidden, size = c["hidden_size"], c["moe_intermediate_size"]
    if layer < c["first_k_dense_replace"]:
        yield from gated(f"{at}.mlp", hidden, c["intermediate_size"], PROJECTIONS)
        return
    yield f"{at}.mlp.gate.weight", [c["n_routed_experts"], hidden]
    if c["model_type"] != "deepseek_v2":
        yield f"{at}.mlp.gate.e_score_correction_bias", [c["n_routed_experts"]]
    for expert in range(c["n_routed_experts"]):
        yield from gated(f"{at}.mlp.experts.{expert}", hidden, size, PROJECTIONS)
    shared = c["n_shared_experts"] * size
    yield from gated(f"{at}.mlp.shared_experts", hidden, shared, PROJECTIONS)


def ernie(at: str, layer: int, c: dict[str, Any]) -> Shapes:
    hidden, size = c["hidden_size"], c["moe_intermediate_size"]
    if not c["moe_layer_start_index"] <= layer <= c["moe_layer_end_index"]:
        yield from gated(f"{at}.mlp", hidden, c["intermediate_size"], PROJECTIONS)
        return
    yield f"{at}.mlp.gate.weight", [c["moe_num_experts"], hidden]
    yield f"{at}.mlp.moe_statics.e_score_correction_bias", [1, c["moe_num_experts"]]
    for expert in range(c["moe_num_experts"]):
        yield from gated(f"{at}.mlp.experts.{expert}", hidden, size, PROJECTIONS)
    shared = c["moe_num_shared_experts"] * size
    yield from gated(f"{at}.mlp.shared_experts", hidden, shared, PROJECTIONS)


def gpt_oss(at: str, _layer: int, c: dict[str, Any]) -> Shapes:
    hidden, size, experts = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    yield f"{at}.mlp.router.weight", [experts, hidden]
    yield f"{at}.mlp.router.bias", [experts]
    yield f"{at}.mlp.experts.gate_up_proj", [experts, hidden, 2 * size]
    yield f"{at}.mlp.experts.gate_up_proj_bias", [experts, 2 * size]
    yield f"{at}.mlp.experts.down_proj", [experts, size, hidden]
    yield f"{at}.mlp.experts.down_proj_bias", [experts, hidden]


def granite(at: str, _layer: int, c: dict[str, Any]) -> Shapes:
    hidden, size, experts = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    yield f"{at}.block_sparse_moe.router.layer.weight", [experts, hidden]
    yield f"{at}.block_sparse_moe.input_linear.weight", [experts, 2 * size, hidden]
    yield f"{at}.block_sparse_moe.output_linear.weight", [experts, hidden, size]


def llama(at: str, _layer: int, c: dict[str, Any]) -> Shapes:
    hidden, size, experts = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    yield f"{at}.feed_forward.router.weight", [experts, hidden]
    yield f"{at}.feed_forward.experts.gate_up_proj", [experts, hidden, 2 * size]
    yield f"{at}.feed_forward.experts.down_proj", [experts, size, hidden]
    yield from gated(f"{at}.feed_forward.shared_expert", hidden, size, PROJECTIONS)


def scout(c: dict[str, Any]) -> Shapes:
    for name, shape in plain(c["text_config"]):
        yield f"language_model.{name}", shape
    yield "multi_modal_projector.linear_1.weight", [5120, 4096]
    yield "vision_model.class_embedding", [1408]


BLOCKS = {
    "mixtral": mixtral,
    "phimoe": mixtral,
    "qwen2_moe": qwen,
    "qwen3_moe": qwen,
    "olmoe": qwen,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "glm4_moe": deepseek,
    "ernie4_5_moe": ernie,
    "gpt_oss": gpt_oss,
    "granitemoe": granite,
    "llama4_text": llama,
}
