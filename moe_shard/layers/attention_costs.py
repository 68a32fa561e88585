"""Count the floating-point operations of attention from its configuration."""

from __future__ import annotations

from moe_shard.config.attention_config import AttentionConfig


def attention_flops(config: AttentionConfig, seq_len: int) -> tuple[int, int]:
    """Count the operations of one token's scores and values, forward and, apart, backward.

    Args:
        config: heads of a layer and their sizes.
        seq_len: S, tokens in a sequence, all of which count for each.
    """
    of_key, of_value = _head_dims(config)
    scores = 2 * config.num_query_heads * (of_key + of_value) * seq_len
    return scores + _indexer(config, seq_len), 2 * scores


def _indexer(config: AttentionConfig, seq_len: int) -> int:
    """Count the operations of one token's scores by an indexer, which has no backward pass.

    Its projections from the model dim are left out: they are less than a hundredth of the others.
    """
    if not config.use_indexer or seq_len <= config.indexer_topk:
        return 0
    width = config.indexer_n_heads * config.indexer_head_dim
    return 2 * width * (seq_len + config.q_lora_rank)


def _head_dims(config: AttentionConfig) -> tuple[int, int]:
    """Return the number of elements of a key and of a value."""
    if config.attention_type == "mla":
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return config.head_dim, config.head_dim
