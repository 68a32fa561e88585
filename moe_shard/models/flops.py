"""Floating-point operations of a training step, counted from the configuration.

The count of PaLM (arXiv 2204.02311, appendix B): 6 operations a token for each parameter that
takes part in a product (2 forward, 4 backward), and 12 * L * N * D * S a token for attention, with
the causal half not taken off. Only the experts a token is routed to count; what remat computes
again and the slots of padded experts do not, so that utilisation falls when work is wasted.
"""

from __future__ import annotations

from moe_shard.config.model import ModelConfig


def matmul_params_per_token(config: ModelConfig) -> int:
    """Parameters that a token is multiplied with: the active ones, without norms and lookup."""
    attention = config.attention
    heads = 2 * attention.num_query_heads + 2 * attention.num_kv_heads
    layer = config.emb_dim * attention.head_dim * heads
    if config.moe is None:
        layer += 3 * config.emb_dim * config.mlp_dim
    else:
        layer += config.emb_dim * config.moe.num_experts
        layer += config.moe.num_experts_per_tok * 3 * config.emb_dim * config.moe.mlp_dim
    return config.num_decoder_layers * layer + config.emb_dim * config.vocab_size


def train_flops_per_token(config: ModelConfig, *, seq_len: int) -> int:
    """Operations that one trained token needs.

    Args:
        config: the model.
        seq_len: S, tokens in a sequence.
    """
    heads = config.attention.num_query_heads * config.attention.head_dim
    attention = 12 * config.num_decoder_layers * heads * seq_len
    return 6 * matmul_params_per_token(config) + attention
