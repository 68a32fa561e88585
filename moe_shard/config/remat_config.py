"""Configure which tensors of a layer wait for the backward pass, and where."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from moe_shard.config.keys import Key, check_leaves

RematPolicy = Literal[
    "none", "dots", "full", "save_exchanged", "custom", "minimal", "minimal_with_context",
    "save_dot_with_context_except_mlp", "save_dot_except_mlpwi", "save_dot_except_mlp",
    "save_qkv_proj", "save_out_proj", "qkv_proj_offloaded", "minimal_offloaded",
]  # fmt: skip
Kept = Literal["device", "offload", "remat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RematConfig:
    """Say for `remat_policy="custom"` what a layer keeps of its tensors: each is a `Kept`.

    "device" keeps a tensor where it is made, "offload" on the host, "remat" recomputes it. The
    names are MaxText's, but for `moe_exchanged`.

    Attributes:
        decoder_layer_input: the residual stream before a layer, which cannot be recomputed.
        query_proj: queries, with their positions.
        key_proj: keys, with their positions.
        value_proj: values.
        context: the heads' weighted values.
        attention_out: the same, before the projection back.
        out_proj: what attention adds to the residual stream.
        query_wa_proj: mla: latents of the queries.
        mla_q: mla: the same, normalised.
        kv_wa_proj: mla: latents of keys and values, with the keys' shared part.
        mla_kv: mla: the latents, normalised.
        mlpwi_0: output of a dense MLP's gate.
        mlpwi_1: output of a dense MLP's up.
        mlpwo: output of a dense MLP.
        moe_mlpwi_0: outputs of the experts' gates.
        moe_mlpwi_1: outputs of the experts' ups.
        moe_mlpwo: outputs of the experts.
        moe_exchanged: what an MoE layer's exchanges deliver: the experts' inputs and outputs.

    Raises:
        UserError: on a value that is not a `Kept`.
    """

    decoder_layer_input: Annotated[
        Literal["device", "offload"], Key(choices=("device", "offload"))
    ] = "device"
    query_proj: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    key_proj: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    value_proj: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    context: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    attention_out: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    out_proj: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    query_wa_proj: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    mla_q: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    kv_wa_proj: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    mla_kv: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    mlpwi_0: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    mlpwi_1: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    mlpwo: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    moe_mlpwi_0: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    moe_mlpwi_1: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    moe_mlpwo: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"
    moe_exchanged: Annotated[Kept, Key(choices=get_args(Kept))] = "remat"

    def __post_init__(self) -> None:
        check_leaves(self)

    def tensors(self, kept: Kept) -> tuple[str, ...]:
        """Return the names of the tensors that are kept so."""
        names = (field.name for field in dataclasses.fields(self))
        return tuple(name for name in names if getattr(self, name) == kept)

    def set_keys(self) -> tuple[str, ...]:
        """Return the names of the keys that are not at their defaults."""
        fields = dataclasses.fields(self)
        return tuple(f.name for f in fields if getattr(self, f.name) != f.default)
