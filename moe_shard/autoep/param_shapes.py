"""Read from the abstract model which parameters it has, as checkpoints divide them.

The modules in `models/` and `moe/` define which parameters a model has. Here they are described
without a device or an array, and divided as in checkpoints: layer by layer, expert by expert, with
gate and up separate. Describing a model takes about a tenth of a second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from moe_shard.config.lora_config import LoraConfig
from moe_shard.config.mesh_config import MESH_AXES
from moe_shard.config.model_config import ModelConfig
from moe_shard.models.cycles import all_stacks
from moe_shard.quiet import hide_accelerator_warnings

if TYPE_CHECKING:
    from moe_shard.models.params import AbstractModel, ParamSpec

EXPERTS = "mlp.experts."
"""Prefix of the paths of parameters that have a dim of experts."""

_MODEL_DIM = "base_emb_dim"
_KEYS = {
    "embed": (_MODEL_DIM,),
    "embed_moe": (_MODEL_DIM,),
    "embed_router": (_MODEL_DIM,),
    "embed_vocab": (_MODEL_DIM,),
    "norm": (_MODEL_DIM,),
    "vocab": ("vocab_size",),
    "heads": ("base_num_query_heads",),
    "kv_heads": ("base_num_kv_heads",),
    "head_dim": ("head_dim",),
    "q_lora": ("q_lora_rank",),
    "kv_lora": ("kv_lora_rank",),
    "exp_router": ("num_experts",),
    "mlp": ("base_mlp_dim",),
    "mlp_moe": ("base_moe_mlp_dim",),
}
"""Logical axis -> the settings that determine the size of its dim."""

_LATENT_DIM = "moe_latent_dim"
_MOE_KEYS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "mlp.shared.": {"mlp": ("shared_experts", "shared_expert_mlp_dim", "base_moe_mlp_dim")},
    "mlp.latent.": {"mlp": (_LATENT_DIM,)},
}
"""The same of parameters whose paths have a prefix."""
_EXPERTS_ON_LATENTS = {"embed_moe": (_LATENT_DIM,), "embed": (_LATENT_DIM,)}
_GLOBAL_KEYS = {"kv_heads": ("global_num_kv_heads",), "head_dim": ("global_head_dim",)}
"""The same in attention of global layers, where these settings are set."""
_QUERY_KEYS = ("qk_nope_head_dim", "qk_rope_head_dim")
_LATENT_KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention.query": {"head_dim": _QUERY_KEYS},
    "attention.query_down": {"head_dim": ("q_lora_rank",), "norm": ("q_lora_rank",)},
    "attention.query_norm": {"norm": ("q_lora_rank",)},
    "attention.query_up": {"head_dim": _QUERY_KEYS},
    "attention.latent_down": {
        "head_dim": ("kv_lora_rank", "qk_rope_head_dim"),
        "norm": ("kv_lora_rank", "qk_rope_head_dim"),
    },
    "attention.latent_norm": {"norm": ("kv_lora_rank",)},
    "attention.latent_up": {"head_dim": ("qk_nope_head_dim", "v_head_dim")},
    "attention.out": {"head_dim": ("v_head_dim",)},
    "attention.indexer.query": {"head_dim": ("indexer_n_heads", "indexer_head_dim")},
    "attention.indexer.key": {"head_dim": ("indexer_head_dim",)},
    "attention.indexer.key_norm": {"norm": ("indexer_head_dim",)},
    "attention.indexer.weight": {"head_dim": ("indexer_n_heads",)},
}
"""The same where multi-head latent attention gives an axis another size."""


_OF_KEY, _OF_VALUE = ("gdn_num_key_heads", "gdn_key_head_dim"), ("gdn_num_value_heads",)
_DELTA_KEYS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("query", "key"), (*_OF_KEY, _MODEL_DIM)),
    **dict.fromkeys(("query_conv", "key_conv"), (*_OF_KEY, "gdn_conv_kernel_dim")),
    **dict.fromkeys(("value", "gate", "out"), (*_OF_VALUE, "gdn_value_head_dim", _MODEL_DIM)),
    "value_conv": (*_OF_VALUE, "gdn_value_head_dim", "gdn_conv_kernel_dim"),
    **dict.fromkeys(("rate", "decay"), (*_OF_VALUE, _MODEL_DIM)),
    **dict.fromkeys(("decay_log", "decay_bias"), _OF_VALUE),
    "norm.scale": ("gdn_value_head_dim",),
}
"""Parameter of a gated delta net -> the settings that determine its size."""


_HEADS = ("mamba_num_heads",)
_OF_GROUP = ("mamba_num_groups", "mamba_state_dim")
_MAMBA_KEYS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("value", "gate", "out"), (*_HEADS, "mamba_head_dim", _MODEL_DIM)),
    **dict.fromkeys(("key", "query"), (*_OF_GROUP, _MODEL_DIM)),
    "value_conv": (*_HEADS, "mamba_head_dim", "mamba_conv_kernel_dim"),
    **dict.fromkeys(("key_conv", "query_conv"), (*_OF_GROUP, "mamba_conv_kernel_dim")),
    "step": (*_HEADS, _MODEL_DIM),
    **dict.fromkeys(("decay_log", "step_shift", "skip"), _HEADS),
    "norm_scale": (*_HEADS, "mamba_head_dim"),
}
"""The same of Mamba-2, where a bias is of the sizes of what it is added to."""

TAPS = ("taps", "_conv")
"""Ends of the names of a convolution's taps: parameters [K, channels], tensors [channels, 1, K]."""


class Slot(NamedTuple):
    """Describe one parameter of one layer (of one expert, in `mlp.experts`) or the whole model.

    Attributes:
        shape: the parameter's shape without the dims of layers and experts.
        inputs: number of its leading dims that a product sums over; 0: it is not a matrix.
        keys: the settings that determine its sizes.
    """

    shape: tuple[int, ...]
    inputs: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ParamSlots:
    """Hold the parameters that the tensors of a checkpoint fill.

    Attributes:
        outer: parameters outside the layers, by dotted path.
        layers: name of a stack of layers -> parameters of one layer of it, by dotted path.
    """

    outer: Mapping[str, Slot]
    layers: Mapping[str, Mapping[str, Slot]]


def count_parameters(model: ModelConfig) -> int:
    """Count the numbers in a model's parameters, adapters apart. No device is started."""
    return _abstract(model).num_params


def slots_of(model: ModelConfig) -> ParamSlots:
    """List the parameters of a model.

    No device is started, so devices may still be chosen afterwards.

    Args:
        model: the model; only what determines its parameters is read.
    """
    if model.moe is not None:
        model = replace(model, moe=replace(model.moe, prefuse_moe_weights=False))
    specs = _abstract(model).specs
    import jax  # only now: what it warns of at its first import is hidden

    outer: dict[str, Slot] = {}
    layers: dict[str, dict[str, Slot]] = {name: {} for name, _, _ in all_stacks(model)}
    own = dict(_MOE_KEYS)
    if model.moe is not None and model.moe.moe_latent_dim != -1:
        own[EXPERTS] = _EXPERTS_ON_LATENTS
    latent = model.attention.attention_type == "mla"
    wide = {axis: keys for axis, keys in _GLOBAL_KEYS.items() if getattr(model.attention, keys[0])}
    of_stack = {
        name: {"attention.": wide} if wide and kind.span == "global" else {}
        for name, kind, _ in all_stacks(model)
    }
    for spec in jax.tree.leaves(specs):
        first, _, rest = spec.name.partition(".")
        if first in layers:
            dims = 2 if rest.startswith(EXPERTS) else 1
            layers[first][rest] = _slot(rest, spec, dims, latent, own | of_stack[first])
        else:
            outer[spec.name] = _slot(spec.name, spec, 0, latent, own)
    return ParamSlots(outer, layers)


def _abstract(model: ModelConfig) -> AbstractModel:
    """Describe a model without its adapters, which are no part of its checkpoint."""
    # Imported here: reading families and headers does not need jax.
    with hide_accelerator_warnings():
        from jax.sharding import AbstractMesh

        from moe_shard.models.params import describe
        from moe_shard.sharding.annotate import Sharding
        from moe_shard.sharding.rules import RuleTable

    sharding = Sharding(AbstractMesh((1,) * len(MESH_AXES), MESH_AXES), RuleTable.default())
    return describe(replace(model, lora=LoraConfig()), sharding)


def _slot(
    path: str,
    spec: ParamSpec,
    stacked: int,
    latent: bool,
    of_prefix: Mapping[str, Mapping[str, tuple[str, ...]]],
) -> Slot:
    """Describe one parameter without its leading dims of layers and experts."""
    shape, axes = spec.shape[stacked:], spec.logical_axes[stacked:]
    inputs = 1 if path.endswith(TAPS) else _inputs(axes)
    if path.startswith("delta."):
        return Slot(shape, inputs, _DELTA_KEYS[path.removeprefix("delta.")])
    if path.startswith("mamba."):
        return Slot(shape, inputs, _MAMBA_KEYS[path.removeprefix("mamba.").removesuffix("_bias")])
    if path.startswith("convolution."):
        taps = ("short_conv_kernel_dim",) if path.endswith("taps") else ()
        return Slot(shape, inputs, (*taps, _MODEL_DIM))
    found = (keys for prefix, keys in of_prefix.items() if path.startswith(prefix))
    own: Mapping[str, tuple[str, ...]] = next(found, {})
    if latent and not own:
        own = _LATENT_KEYS.get(re.sub(r"(\.scale|[._]bias)$", "", path), {})
    keys: list[str] = []
    for axis in axes:
        # In attention a dim without a name holds a head's elements, elsewhere it is the model dim.
        name = axis or ("head_dim" if path.startswith("attention.") else "embed")
        keys += own.get(name, _KEYS[name])
    ordered = sorted(dict.fromkeys(keys), key=_MODEL_DIM.__eq__)
    return Slot(shape, _inputs(axes), tuple(ordered))


def _inputs(axes: tuple[str | None, ...]) -> int:
    """Return how many of the leading dims a product sums over.

    A product with a weight sums over a leading model dim or latent, or over all other dims where
    the model dim is the last. An embedding table is only looked up.
    """
    if len(axes) == 3 and axes[:2] == (None, "embed"):
        return 2  # several inputs of one product, as of an MTP layer
    if len(axes) > 1 and axes[-1] in ("embed", "embed_moe"):
        return len(axes) - 1
    is_summed = axes[0] is not None and axes[0].startswith(("embed", "q_lora", "kv_lora"))
    return int(len(axes) > 1 and is_summed)
