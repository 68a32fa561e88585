"""Count the floating-point operations of a training step from the configuration.

The count is PaLM's (arXiv 2204.02311, appendix B): 6 operations per token for each parameter of a
product (2 forward, 4 backward), and for attention 6 * N * S for each element of a key and of a
value, in every layer, without a discount for causal, sliding or chunked masks. Only the experts
that a token is routed to and the shared ones count. Recomputation and empty capacity slots do not,
so that utilisation falls when work is wasted.
"""

from __future__ import annotations

from moe_shard.config.attention_config import AttentionConfig
from moe_shard.config.model_config import ModelConfig
from moe_shard.config.moe_config import MoEConfig


def matmul_params_per_token(config: ModelConfig) -> int:
    """Count the parameters that a token is multiplied with, without norms and lookup."""
    total = config.emb_dim * config.vocab_size
    for kind in config.layer_kinds:
        total += _attention_params(config.attention, config.emb_dim)
        if kind.moe and config.moe is not None:
            total += _moe_params(config.moe, config.emb_dim, config.gating.projections)
        else:
            total += config.gating.projections * config.emb_dim * config.mlp_dim
    return total


def train_flops_per_token(config: ModelConfig, *, seq_len: int) -> int:
    """Count the floating-point operations of training on one token, forward and backward.

    Args:
        config: the model.
        seq_len: S, tokens in a sequence.
    """
    of_key, of_value = _head_dims(config.attention)
    each = 6 * config.attention.num_query_heads * (of_key + of_value) * seq_len
    return 6 * matmul_params_per_token(config) + config.num_decoder_layers * each


def _attention_params(config: AttentionConfig, emb_dim: int) -> int:
    heads = config.num_query_heads
    of_key, of_value = _head_dims(config)
    out = heads * of_value * emb_dim
    if config.attention_type == "mla":
        inner = config.q_lora_rank or emb_dim
        queries = emb_dim * config.q_lora_rank + inner * heads * of_key
        latent = emb_dim * (config.kv_lora_rank + config.qk_rope_head_dim)
        expanded = config.kv_lora_rank * heads * (config.qk_nope_head_dim + of_value)
        return queries + latent + expanded + out
    return emb_dim * (heads * of_key + config.num_kv_heads * (of_key + of_value)) + out


def _head_dims(config: AttentionConfig) -> tuple[int, int]:
    """Return the number of elements of a key and of a value."""
    if config.attention_type == "mla":
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return config.head_dim, config.head_dim


def _moe_params(config: MoEConfig, emb_dim: int, projections: int) -> int:
    hidden = config.num_experts_per_tok * config.moe_mlp_dim + config.shared_dim
    router = emb_dim * (config.num_experts + config.shared_expert_gate)
    return router + projections * emb_dim * hidden
