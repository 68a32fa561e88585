"""Hold the rule table of a run that names none: `logical_axis_rules` of `configs/base.yml`.

Each rule is a logical axis and the mesh axes that its dim is split over, in order of precedence.
"""

from __future__ import annotations

DEFAULT_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # activations
    ("activation_batch", ("data", "fsdp", "fsdp_transpose", "expert")),  # sequences
    ("activation_length", ("context",)),  # positions
    ("activation_embed", ("tensor",)),  # model dim
    ("activation_heads", ("tensor",)),  # query heads
    ("activation_kv_heads", ("tensor",)),  # key and value heads
    ("activation_kv_length", ()),  # positions of keys and values
    ("activation_head_dim", ()),  # elements of a head
    # key heads of gated delta nets, with their value heads:
    ("activation_gdn_head", ("tensor",)),
    ("activation_mamba_group", ("tensor",)),  # groups of Mamba-2's heads, with their heads
    ("activation_mamba_group", ()),  # where tensor does not divide them
    # heads of one group, where tensor does not divide the groups:
    ("activation_mamba_head", ("tensor",)),
    ("activation_mamba_head", ()),  # where the groups have taken tensor
    ("activation_conv_channel", ("tensor",)),  # channels of short convolutions
    ("activation_mlp", ("tensor",)),  # hidden dim of a dense MLP
    ("activation_vocab", ("tensor",)),  # logits
    # activations in the MoE layer
    ("activation_batch_moe", ("data", "fsdp", "fsdp_transpose", "expert")),  # sequences, flag off
    ("activation_batch_no_exp", ("data", "fsdp", "fsdp_transpose")),  # sequences, flag on
    ("activation_length_moe", ("context",)),  # positions
    # experts at work; the axes here are what reports call expert axes:
    ("activation_exp", ("expert",)),
    ("activation_embed_moe", ("tensor",)),  # model dim
    ("activation_mlp_moe", ("tensor",)),  # hidden dim of an expert
    # weights of the MoE layer
    # expert stands first, so that the experts a device works on are those its fsdp group stores
    ("exp", ("expert", "fsdp")),  # experts as stored: FSDP over whole experts
    ("exp", ("expert",)),  # experts where expert * fsdp does not divide them
    ("mlp_moe", ("fsdp_transpose", "tensor")),  # hidden dim of an expert
    ("embed_moe", ("fsdp", "fsdp_transpose", "context")),  # model dim
    ("embed_moe", ("fsdp", "context")),  # model dim where mlp_moe has taken fsdp_transpose
    ("embed_moe", ("context",)),  # model dim where exp has taken fsdp
    ("embed_router", ()),  # model dim of the router, replicated
    ("exp_router", ()),  # experts of the router, replicated
    # other weights
    ("mlp", ("fsdp_transpose", "tensor")),  # hidden dim of a dense MLP
    ("embed", ("fsdp", "fsdp_transpose", "context", "expert")),  # model dim
    ("embed", ("fsdp", "context", "expert")),  # model dim where mlp has taken fsdp_transpose
    ("q_lora", ("fsdp", "fsdp_transpose", "context", "expert")),  # mla: latent of the queries
    ("kv_lora", ("fsdp", "fsdp_transpose", "context", "expert")),  # mla: latent of keys and values
    ("heads", ("tensor",)),  # query heads
    ("kv_heads", ("tensor",)),  # key and value heads
    ("head_dim", ()),  # elements of a head
    ("gdn_head", ("tensor",)),  # key heads of gated delta nets
    ("gdn_value", ()),  # value heads of one key head
    ("mamba_group", ("tensor",)),  # groups of Mamba-2's heads
    ("mamba_group", ()),  # where tensor does not divide them
    ("mamba_head", ("tensor",)),  # heads of one group
    ("mamba_head", ()),  # where the groups have taken tensor
    ("conv_channel", ("tensor",)),  # channels of short convolutions
    ("vocab", ("tensor",)),  # rows of the embedding table
    # model dim of the embedding table:
    ("embed_vocab", ("fsdp", "fsdp_transpose", "context", "expert")),
    ("norm", ()),  # scales and biases over the model dim
    ("layers", ()),  # layers of a scanned stack
)
