"""Small models of every family, two or more shapes each, as data.

Settings are keyword arguments of the family's own configuration class. Between them the shapes turn
on what a family's published models use and what else its code can do: each `about` says what for.
Sizes are the least at which a thing acts: windows and chunks are shorter than the rows, groups keep
some experts out, clamps bind. 8 experts divide by every size of the expert axis, 16 leave two on a
device. Seeds were tried until no token's k-th and next expert are near a tie; `test_reference.py`
holds them to that.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np

ROWS = 8
LENGTH = 16
VOCAB = 96
PROMPTS = 2
PROMPT_LENGTH = 12
NEW_TOKENS = 32
UPDATES = 10
LEARNING_RATE = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One small model.

    Attributes:
        family: `model_type` of its configuration class.
        name: of the shape, unique in the family.
        about: what it is for.
        settings: of the configuration class, beyond `COMMON`.
        seed: of its weights and tokens.
    """

    family: str
    name: str
    about: str
    settings: dict[str, Any]
    seed: int = 0

    @property
    def id(self) -> str:
        """Name in test ids and file names."""
        return f"{self.family}-{self.name}"

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments of the configuration class."""
        return COMMON | self.settings

    def tokens(self) -> np.ndarray:
        """Ids [B, S + 1]: inputs are all but the last of a row, targets all but the first."""
        seed = zlib.crc32(f"{self.id} tokens {self.seed}".encode())
        rng = np.random.Generator(np.random.PCG64(seed))
        return rng.integers(0, VOCAB, (ROWS, LENGTH + 1))


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    # No token ends a text, and none is left out of the gradient as padding.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}

MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}


def _yarn(**more: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        **more,
    }


def _longrope(original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": original,
        "short_factor": [1.0, 1.1, 1.3, 1.8],
        "long_factor": [1.2, 1.9, 3.0, 4.5],
        # Of one size, as in the published model.
        "short_mscale": 1.3,
        "long_mscale": 1.3,
    }


SHAPES = (
    Shape(
        family="mixtral",
        name="grouped",
        about="grouped-query attention, top-2 of 8",
        settings={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.05,
        },
    ),
    Shape(
        family="mixtral",
        name="sliding",
        about="one key head, a window in all layers, a head of its own size, tied, top-8 of 16",
        settings={
            "hidden_size": 48,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "num_local_experts": 16,
            "num_experts_per_tok": 8,
            "sliding_window": 5,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
            "router_aux_loss_coef": 0.02,
        },
    ),
    Shape(
        family="qwen2_moe",
        name="sparse-steps",
        about="biases, a gated shared expert, weights that do not sum to 1, every other layer "
        "dense and one of the others too, windows in every other of the first layers",
        settings={
            "hidden_size": 32,
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 3,
        },
    ),
    Shape(
        family="qwen2_moe",
        name="mlp-only",
        about="a first dense layer, no biases, weights that sum to 1, tied",
        settings={
            "hidden_size": 48,
            "intermediate_size": 40,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "qkv_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    Shape(
        family="qwen3_moe",
        name="grouped",
        about="normalised heads, top-8 of 16",
        seed=1,
        settings={
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "num_experts": 16,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.03,
        },
    ),
    Shape(
        family="qwen3_moe",
        name="top-1",
        about="biases, windows, every other layer dense, tied, one expert a token and its weight",
        settings={
            "hidden_size": 48,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
            "attention_bias": True,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
        },
    ),
    Shape(
        family="olmoe",
        name="clipped",
        about="queries, keys and values clipped after the norm of all heads together",
        settings={
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "clip_qkv": 0.7,
            "norm_topk_prob": False,
        },
    ),
    Shape(
        family="olmoe",
        name="biased",
        about="biases, grouped queries, weights that sum to 1, top-8 of 16, tied",
        seed=14,
        settings={
            "hidden_size": 48,
            "intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 16,
            "num_experts_per_tok": 8,
            "attention_bias": True,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
        },
    ),
    Shape(
        family="deepseek_v2",
        name="greedy",
        about="MLA without a latent of queries, as V2-Lite; a first dense layer",
        settings=MLA
        | {
            "hidden_size": 32,
            "intermediate_size": 56,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 3,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "topk_method": "greedy",
        },
    ),
    Shape(
        family="deepseek_v2",
        name="grouped",
        about="a latent of queries, biases, groups by their best expert, yarn with both mscales",
        settings=MLA
        | {
            "hidden_size": 48,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 2,
            "q_lora_rank": 24,
            "attention_bias": True,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rope_parameters": _yarn(mscale=1.0, mscale_all_dim=0.707),
            "rms_norm_eps": 1e-3,
        },
    ),
    Shape(
        family="deepseek_v3",
        name="grouped",
        about="a latent of queries, groups by their best two, correction bias, yarn, pairs",
        seed=1,
        settings=MLA
        | {
            "hidden_size": 32,
            "intermediate_size": 56,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 3,
            "q_lora_rank": 24,
            "first_k_dense_replace": 1,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": _yarn(mscale=1.0, mscale_all_dim=1.0),
        },
    ),
    Shape(
        family="deepseek_v3",
        name="halves",
        about="no latent of queries, biases, halves of a head turned, yarn with one mscale, one "
        "group of two kept, weights that do not sum to 1, tied",
        settings=MLA
        | {
            "hidden_size": 48,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 4,
            "q_lora_rank": None,
            "attention_bias": True,
            "first_k_dense_replace": 2,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "rope_interleave": False,
            "rope_parameters": _yarn(mscale=0.8),
            "tie_word_embeddings": True,
        },
    ),
    Shape(
        family="gpt_oss",
        name="sinks",
        about="sinks, biases everywhere, clamps that bind, windows in every other layer, yarn",
        settings={
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "swiglu_limit": 0.9,
            "rope_parameters": _yarn(truncate=False),
            "router_aux_loss_coef": 0.05,
        },
    ),
    Shape(
        family="gpt_oss",
        name="full-first",
        about="no biases in attention, one key head, windows in the odd layers, top-4 of 16",
        settings={
            "hidden_size": 48,
            "intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "sliding_window": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "attention_bias": False,
            "rope_parameters": _yarn(truncate=True),
            "tie_word_embeddings": True,
        },
    ),
    Shape(
        family="llama4_text",
        name="interleaved",
        about="every other layer dense, chunks, a layer without positions that grows its queries",
        settings={
            "hidden_size": 32,
            "intermediate_size": 24,
            "intermediate_size_mlp": 56,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 6,
            "floor_scale": 4,
            "attn_scale": 0.3,
        },
    ),
    Shape(
        family="llama4_text",
        name="top-2",
        about="experts in all layers, no norms of heads, biases, every other layer without "
        "positions, no chunks, no growing, two experts a token, tied",
        settings={
            "hidden_size": 48,
            "intermediate_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "no_rope_layer_interval": 2,
            "use_qk_norm": False,
            "attention_bias": True,
            "attn_temperature_tuning": False,
            "attention_chunk_size": None,
            "tie_word_embeddings": True,
        },
    ),
    Shape(
        family="granitemoe",
        name="multipliers",
        about="multipliers of the embedding, the residual stream, the scores and the logits",
        settings={
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 1.5,
        },
    ),
    Shape(
        family="granitemoe",
        name="biased",
        about="biases, one key head, tied, top-8 of 16, scores that are not scaled",
        settings={
            "hidden_size": 48,
            "intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "num_local_experts": 16,
            "num_experts_per_tok": 8,
            "attention_bias": True,
            "attention_multiplier": 1.0,
            "tie_word_embeddings": True,
        },
    ),
    Shape(
        family="phimoe",
        name="short",
        about="LayerNorm, biases, longrope within the original length, sparsemixer",
        seed=1,
        settings={
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.3,
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_parameters": _longrope(64),
        },
    ),
    Shape(
        family="phimoe",
        name="long",
        about="longrope beyond the original length, windows, no biases, tied",
        seed=6,
        settings={
            "hidden_size": 48,
            "intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.15,
            "sliding_window": 6,
            "rope_parameters": _longrope(8),
            "tie_word_embeddings": True,
        },
    ),
    Shape(
        family="glm4_moe",
        name="half-turned",
        about="half of a normalised head turned, biases, a first dense layer, one group",
        settings={
            "hidden_size": 32,
            "intermediate_size": 56,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.5,
            "rope_parameters": COMMON["rope_parameters"] | {"partial_rotary_factor": 0.5},
        },
    ),
    Shape(
        family="glm4_moe",
        name="grouped",
        about="a quarter of a head turned, groups, weights that do not sum to 1, tied",
        settings={
            "hidden_size": 48,
            "intermediate_size": 40,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "first_k_dense_replace": 2,
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "rope_parameters": COMMON["rope_parameters"] | {"partial_rotary_factor": 0.25},
            "tie_word_embeddings": True,
        },
    ),
    Shape(
        family="ernie4_5_moe",
        name="middle",
        about="experts in the middle layers, pairs turned, softmax with a correction bias, tied",
        settings={
            "hidden_size": 32,
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "router_aux_loss_coef": 0.05,
        },
    ),
    Shape(
        family="ernie4_5_moe",
        name="interval",
        about="experts in every other layer, none shared, top-8 of 16, untied",
        seed=2,
        settings={
            "hidden_size": 48,
            "intermediate_size": 40,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "moe_num_experts": 16,
            "moe_k": 8,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_interval": 2,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-3,
        },
    ),
)

FAMILIES = tuple(dict.fromkeys(shape.family for shape in SHAPES))
"""In the order of `SHAPES`."""

TRAINED = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
"""Families whose gradients and updates are compared too."""
