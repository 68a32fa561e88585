"""Count the floating-point operations of a training step from the configuration.

The count is PaLM's (arXiv 2204.02311, appendix B): 6 operations per token for each parameter of a
product (2 forward, 4 backward), and for attention 6 * N * S for each element of a key and of a
value, in every layer that has it, without a discount for causal, sliding or chunked masks. What
another token mixer computes besides its products is counted beside it, in `layers/`. Only the
experts that a token is routed to and the shared ones count. Recomputation and empty capacity slots
do not, so that utilisation falls when work is wasted.
"""

from __future__ import annotations

from moe_shard.config.model_config import ModelConfig
from moe_shard.config.moe_config import MoEConfig
from moe_shard.models.mixers import MIXERS


def matmul_params_per_token(config: ModelConfig) -> int:
    """Count the parameters that a token is multiplied with, without norms and lookup."""
    total = config.emb_dim * config.vocab_size
    for kind in config.all_layer_kinds:
        if kind.mixer != "none":
            total += MIXERS[kind.mixer].params(config)
        if kind.moe and config.moe is not None:
            total += _moe_params(config.moe, config.emb_dim, config.gating.projections)
        elif kind.mlp:
            total += config.gating.projections * config.emb_dim * config.mlp_dim
    # An MTP layer also projects two vectors to one, and the head makes its logits.
    ahead = 2 * config.emb_dim**2 + config.emb_dim * config.vocab_size
    return total + config.mtp.mtp_num_layers * ahead


def train_flops_per_token(config: ModelConfig, *, seq_len: int) -> int:
    """Count the floating-point operations of training on one token, forward and backward.

    Args:
        config: the model.
        seq_len: S, tokens in a sequence.
    """
    mixed = sum(
        MIXERS[kind.mixer].flops(config, seq_len)
        for kind in config.all_layer_kinds
        if kind.mixer != "none"
    )
    return 6 * matmul_params_per_token(config) + mixed


def _moe_params(config: MoEConfig, emb_dim: int, projections: int) -> int:
    hidden = config.num_experts_per_tok * config.moe_mlp_dim + config.shared_dim
    router = emb_dim * (config.num_experts + config.shared_expert_gate)
    return router + projections * emb_dim * hidden
