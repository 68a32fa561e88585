"""Name the dims of an MoE layer's arrays: a logical axis each, or None for one never sharded.

The rule table maps these names to mesh axes. Parameters have them in their metadata; activations
are annotated with them in `placement.py`.
"""

from __future__ import annotations

TOKENS = ("activation_batch_moe", "activation_length_moe", "activation_embed_moe")
EXPERT_WEIGHT_IN = ("exp", "embed_moe", "mlp_moe")
EXPERT_WEIGHT_FUSED = ("exp", "embed_moe", None, "mlp_moe")
EXPERT_WEIGHT_OUT = ("exp", "mlp_moe", "embed_moe")
EXPERT_BIAS_IN = ("exp", "mlp_moe")
EXPERT_BIAS_FUSED = ("exp", None, "mlp_moe")
EXPERT_BIAS_OUT = ("exp", None)
# Adapters: A has the input dim of its weight, B the output dim, and the rank is never sharded.
EXPERT_A_IN = ("exp", "embed_moe", None)
EXPERT_B_IN = ("exp", None, "mlp_moe")
EXPERT_A_OUT = ("exp", "mlp_moe", None)
EXPERT_B_OUT = ("exp", None, "embed_moe")
ROUTER_KERNEL = ("embed_router", "exp_router")
ROUTER_VECTOR = ("exp_router",)
ROUTER_SCALE = ("norm",)
SHARED_GATE = ("embed_router",)
