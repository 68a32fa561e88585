"""MaxText's keys that this package does not have, sorted by what they would mean here.

A MaxText model file loads unchanged. Its keys are of four kinds: those in `configs/base.yml`,
those that ask for another model than the one built here (`UNBUILT`, `UNBUILT_VALUES`: the file
loads, training it is refused), those that would be ignored at a person's peril (`REFUSED`), and
the rest, which mean nothing here and are named in one warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.errors import UserError

ALIASES = {
    "opt_type": "optimizer",
    "cosine_learning_rate_final_fraction": "learning_rate_final_fraction",
}
"""MaxText's name -> the name here."""

_OFF = (False, None)
_ZERO = (0, None)
_NEGATIVE = (-1, None)

UNBUILT: Mapping[str, tuple[Any, ...]] = {
    # Blocks that pre-norm attention, RoPE and a gated MLP (or MoE layer) describe fully, given
    # the other keys. gemma scales its embeddings, gpt3 has LayerNorm, and so on.
    "decoder_block": ("default", "llama2", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
    # A file that inherits from others: its own keys are not the whole model.
    "base_config": (),
    "global_parameter_scale": (1,),
    # attention
    "attention_type": ("global",),
    "attention_bias": _OFF,
    "attention_sink": _OFF,
    "attention_output_dim": _NEGATIVE,
    "attn_logits_soft_cap": _ZERO,
    "sliding_window_size": _ZERO,
    "chunk_attn_window_size": _ZERO,
    "share_kv_projections": _OFF,
    "global_head_dim": _ZERO,
    "global_num_kv_heads": _ZERO,
    "num_kv_shared_layers": _ZERO,
    "qk_norm_with_scale": (True,),
    "v_norm_with_scale": (True,),
    "temperature_tuning": _OFF,
    "use_indexer": _OFF,
    "use_qk_clip": _OFF,
    "compress_ratios": ([], None),
    "moba": _OFF,
    # positions
    "rope_type": ("default",),
    "rope_linear_scaling_factor": (1, None),
    "rope_min_timescale": (1,),
    "local_rope_max_timescale": _NEGATIVE,
    "global_rope_max_timescale": _NEGATIVE,
    "partial_rotary_factor": (1,),
    "nope_layer_interval": _NEGATIVE,
    "trainable_position_size": _NEGATIVE,
    "use_untrainable_positional_embedding": _OFF,
    "use_mrope": _OFF,
    # MLP, MoE and the router
    "mlp_bias": _OFF,
    "mlp_activations_limit": _NEGATIVE,
    "routed_bias": _OFF,
    "routed_bias_update_rate": _ZERO,
    "routed_scaling_factor": (1,),
    "routed_score_func": ("", "softmax", None),
    "n_routing_groups": _NEGATIVE,
    "topk_routing_group": _NEGATIVE,
    "first_num_hash_layers": _ZERO,
    "first_num_dense_layers": _ZERO,
    "shared_experts": _ZERO,
    "interleave_moe_layer_step": (1,),
    "inhomogeneous_layer_cycle_interval": (1,),
    "moe_expert_input_dim": _NEGATIVE,
    "use_double_wide_mlp": _OFF,
    "dropout_rate": _ZERO,
    # the stack and its ends
    "use_post_attn_norm": _OFF,
    "use_post_ffw_norm": _OFF,
    "normalize_embedding_logits": _OFF,
    "final_logits_soft_cap": _ZERO,
    "z_loss_multiplier": _ZERO,
    "hidden_size_per_layer_input": _ZERO,
    "mtp_num_layers": _ZERO,
    "mhc_expansion_rate": (1,),
    "engram_layers": ([], None),
    "use_multimodal": _OFF,
    "use_audio": _OFF,
    "quantization": ("", None),
    "lr_schedule_type": ("cosine",),
}
"""Key -> the values that ask for nothing beyond what is built; any other asks for another model."""

UNBUILT_VALUES: Mapping[str, tuple[Any, ...]] = {
    "optimizer": ("adam_pax", "muon"),
    "dtype": ("float16",),
    "weight_dtype": ("float16", "float8_e4m3fn"),
    "mlp_activations": (["sigmoid", "linear"], ["gelu"], ["relu"], ["silu"], ["relu", "relu"]),
}
"""Keys of `base.yml` -> values that a model file may ask for and that are not built here."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    **{
        f"{level}_{axis}_parallelism": (1,)
        for level in ("ici", "dcn")
        for axis in (
            "diloco",
            "pipeline",
            "sequence",
            "tensor_sequence",
            "tensor_transpose",
            "context_autoregressive",
            "context_usp_ulysses",
            "autoregressive",
        )
    },
}
"""Key -> its neutral values; any other value is an error, because ignoring it would mislead."""

MAXTEXT_AXES = (
    "diloco",
    "stage",
    "sequence",
    "tensor_sequence",
    "tensor_transpose",
    "context_autoregressive",
    "context_usp_ulysses",
    "autoregressive",
)
"""Mesh axes of MaxText that this mesh does not have."""


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of the neutral ones; MaxText writes null as the text None too."""
    if value == "None":
        value = None
    # True == 1 in Python, and `shared_experts: true` is not `shared_experts: 1`.
    return any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral
    )


def check_refused(key: str, value: Any, where: str) -> None:
    """Let the neutral value of a `REFUSED` key pass.

    Raises:
        UserError: any other value.
    """
    neutral = REFUSED[key]
    if not is_neutral(value, neutral):
        raise UserError(
            f"{where}: {key}={shown(value)} is not built in this version\n"
            f"fix: leave it out ({key}={shown(neutral[0])})"
        )
