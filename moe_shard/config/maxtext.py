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

Settings = Mapping[str, Any]

IMPLIED: tuple[tuple[Settings, Settings], ...] = (
    ({"decoder_block": "deepseek"}, {"rope_interleave": True, "norm_topk_prob": False}),
    (
        {"decoder_block": "deepseek", "routed_score_func": "sigmoid"},
        {"norm_topk_prob": True},
    ),
    ({"decoder_block": "gpt_oss"}, {"attention_pattern": ["sliding", "global"]}),
    ({"decoder_block": "gpt_oss", "attention_bias": True}, {"attention_out_bias": True}),
    (
        {"decoder_block": "llama4"},
        {
            "attention_pattern": ["chunked", "chunked", "chunked", "global"],
            "qk_norm_type": "l2",
            "rope_interleave": True,
            "routed_score_func": "sigmoid",
            "routed_score_on_input": True,
            "norm_topk_prob": False,
        },
    ),
)
"""What a file of MaxText's has settled by saying something, unless it says otherwise itself."""

MEANT: tuple[tuple[Settings, Settings], ...] = (
    ({"routed_score_func": ""}, {"routed_score_func": "softmax"}),
    ({"routed_score_func": None}, {"routed_score_func": "softmax"}),
    (
        {"decoder_block": "gpt_oss", "routed_bias": True},
        {"routed_bias": False, "router_bias": True},
    ),
    (
        {"decoder_block": "gpt_oss", "mlp_activations": ["sigmoid", "linear"]},
        {"mlp_activations": ["quick_gelu", "linear"], "mlp_linear_offset": 1.0},
    ),
)
"""What a file of MaxText's means by what it says, where the words have another meaning here."""

_OFF = (False, None)
_ZERO = (0, None)
_NEGATIVE = (-1, None)

UNBUILT: Mapping[str, tuple[Any, ...]] = {
    # Blocks that the other keys describe fully, together with what `IMPLIED` and `MEANT` say of
    # them. gemma has a norm after attention, gpt3 learned positions, and so on.
    "decoder_block": (
        *("default", "llama2", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
        *("deepseek", "gpt_oss", "llama4"),
    ),
    # A file that inherits from others: its own keys are not the whole model.
    "base_config": (),
    "global_parameter_scale": (1,),
    # attention
    "attention_output_dim": _NEGATIVE,
    "share_kv_projections": _OFF,
    "global_head_dim": _ZERO,
    "global_num_kv_heads": _ZERO,
    "num_kv_shared_layers": _ZERO,
    "qk_norm_with_scale": (True,),
    "v_norm_with_scale": (True,),
    "use_indexer": _OFF,
    "use_qk_clip": _OFF,
    "compress_ratios": ([], None),
    "moba": _OFF,
    # positions
    "rope_linear_scaling_factor": (1, None),
    "rope_min_timescale": (1,),
    "local_rope_max_timescale": _NEGATIVE,
    "global_rope_max_timescale": _NEGATIVE,
    "trainable_position_size": _NEGATIVE,
    "use_untrainable_positional_embedding": _OFF,
    "use_mrope": _OFF,
    # MLP, MoE and the router
    "first_num_hash_layers": _ZERO,
    "moe_expert_input_dim": _NEGATIVE,
    "use_double_wide_mlp": _OFF,
    "dropout_rate": _ZERO,
    # the stack and its ends
    "use_post_attn_norm": _OFF,
    "use_post_ffw_norm": _OFF,
    "normalize_embedding_logits": _OFF,
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
    "weight_dtype": ("float8_e4m3fn",),
    "attention_type": ("local_sliding", "chunk", "full", "compressed"),
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


def read(written: Settings) -> dict[str, Any]:
    """What a file says, with what it implies and in this package's words."""

    def found(table: tuple[tuple[Settings, Settings], ...]) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        for said, settled in table:
            if all(key in written and written[key] == value for key, value in said.items()):
                settings |= settled
        return settings

    return {**found(IMPLIED), **written, **found(MEANT)}


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
