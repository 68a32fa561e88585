"""The decoder's parameters as a checkpoint sees them: which there are, and their shapes, by layer.

The modules in `models/` and `moe/` make the parameters; this says the same from the configuration
alone, so that a checkpoint can be looked at without jax.
"""

from __future__ import annotations

from typing import NamedTuple

from moe_shard.config.attention_config import AttentionConfig
from moe_shard.config.model_config import LayerKind, ModelConfig

Path = tuple[str, ...]


class Slot(NamedTuple):
    """One parameter of one layer (of one expert, in `mlp.experts`), or of the whole model.

    Attributes:
        shape: of the parameter, without the dims of layers and experts.
        inputs: how many of its first dims a product sums over; 0: it is no matrix.
        keys: the settings that the sizes come from.
    """

    shape: tuple[int, ...]
    inputs: int
    keys: tuple[str, ...]


_M, _V, _F, _H, _E = (
    "base_emb_dim",
    "vocab_size",
    "base_mlp_dim",
    "base_moe_mlp_dim",
    "num_experts",
)
_N, _J, _D = "base_num_query_heads", "base_num_kv_heads", "head_dim"


def outer_slots(model: ModelConfig) -> dict[str, Slot]:
    """Parameters outside the layers, by dotted path."""
    dim, vocab = model.emb_dim, model.vocab_size
    slots = {"embedding.table": Slot((vocab, dim), 0, (_V, _M))}
    if not model.logits_via_embedding:
        slots["embedding.kernel"] = Slot((dim, vocab), 1, (_V, _M))
    if model.logits_bias:
        slots["embedding.bias"] = Slot((vocab,), 0, (_V,))
    return slots | _norm("final_norm", model)


def layer_slots(model: ModelConfig, kind: LayerKind) -> dict[str, Slot]:
    """Parameters of a layer of one kind, by dotted path."""
    attention = (
        _latent_attention(model) if model.attention.attention_type == "mla" else _attention(model)
    )
    slots = _norm("attention_norm", model) | _norm("mlp_norm", model)
    slots |= {f"attention.{name}": slot for name, slot in attention.items()}
    if not kind.moe:
        return slots | _mlp("mlp", model, model.mlp_dim, (_F,))
    assert model.moe is not None, "of the kinds of layers"
    dim, experts, moe = model.emb_dim, model.moe.num_experts, model.moe
    slots["mlp.router.kernel"] = Slot((dim, experts), 1, (_E, _M))
    if moe.router.router_bias:
        slots["mlp.router.bias"] = Slot((experts,), 0, (_E,))
    if moe.router.routed_bias:
        slots["mlp.router.correction_bias"] = Slot((experts,), 0, (_E,))
    slots |= _mlp("mlp.experts", model, moe.moe_mlp_dim, (_H,))
    if moe.shared_experts:
        keys = ("shared_experts", "shared_expert_mlp_dim", _H)
        slots |= _mlp("mlp.shared", model, moe.shared_dim, keys)
        if moe.shared_expert_gate:
            slots["mlp.shared_gate"] = Slot((dim,), 0, (_M,))
    return slots


def _norm(name: str, model: ModelConfig) -> dict[str, Slot]:
    slots = {f"{name}.scale": Slot((model.emb_dim,), 0, (_M,))}
    if model.normalization_type == "layer":
        slots[f"{name}.bias"] = slots[f"{name}.scale"]
    return slots


def _mlp(name: str, model: ModelConfig, hidden: int, keys: tuple[str, ...]) -> dict[str, Slot]:
    dim, both = model.emb_dim, (*keys, _M)
    inward, outward = Slot((dim, hidden), 1, both), Slot((hidden, dim), 1, both)
    slots = {f"{name}.gate": inward, f"{name}.up": inward, f"{name}.down": outward}
    if model.gating.mlp_bias:
        inward = Slot((hidden,), 0, keys)
        slots |= {f"{name}.gate_bias": inward, f"{name}.up_bias": inward}
        slots[f"{name}.down_bias"] = Slot((dim,), 0, (_M,))
    return slots


def _attention(model: ModelConfig) -> dict[str, Slot]:
    config, dim = model.attention, model.emb_dim
    queries = config.num_query_heads, config.head_dim
    keys = config.num_kv_heads, config.head_dim
    slots = {"query": Slot((dim, *queries), 1, (_N, _D, _M))}
    slots["key"] = slots["value"] = Slot((dim, *keys), 1, (_J, _D, _M))
    slots["out"] = Slot((*queries, dim), 2, (_N, _D, _M))
    if config.attention_bias:
        slots["query_bias"] = Slot(queries, 0, (_N, _D))
        slots["key_bias"] = slots["value_bias"] = Slot(keys, 0, (_J, _D))
    if config.use_qk_norm and config.qk_norm_type == "head":
        slots["query_norm.scale"] = slots["key_norm.scale"] = Slot((config.head_dim,), 0, (_D,))
    if config.use_qk_norm and config.qk_norm_type == "projection":
        slots["query_norm.scale"] = Slot(queries, 0, (_N, _D))
        slots["key_norm.scale"] = Slot(keys, 0, (_J, _D))
    return slots | _output(config, dim)


def _latent_attention(model: ModelConfig) -> dict[str, Slot]:
    config, dim = model.attention, model.emb_dim
    heads, rank, query_rank = config.num_query_heads, config.kv_lora_rank, config.q_lora_rank
    nope, turned, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    of_key = (_N, "qk_nope_head_dim", "qk_rope_head_dim")
    down = (rank + turned,)
    slots = {
        "latent_down": Slot((dim, *down), 1, ("kv_lora_rank", "qk_rope_head_dim", _M)),
        "latent_norm.scale": Slot((rank,), 0, ("kv_lora_rank",)),
        "latent_up": Slot(
            (rank, heads, nope + value),
            1,
            (_N, "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"),
        ),
        "out": Slot((heads, value, dim), 2, (_N, "v_head_dim", _M)),
    }
    if config.attention_bias:
        slots["latent_down_bias"] = Slot(down, 0, ("kv_lora_rank", "qk_rope_head_dim"))
    if query_rank == 0:
        slots["query"] = Slot((dim, heads, nope + turned), 1, (*of_key, _M))
        return slots | _output(config, dim)
    key = "q_lora_rank"
    slots["query_down"] = Slot((dim, query_rank), 1, (key, _M))
    slots["query_norm.scale"] = Slot((query_rank,), 0, (key,))
    slots["query_up"] = Slot((query_rank, heads, nope + turned), 1, (*of_key, key))
    if config.attention_bias:
        slots["query_down_bias"] = Slot((query_rank,), 0, (key,))
    return slots | _output(config, dim)


def _output(config: AttentionConfig, dim: int) -> dict[str, Slot]:
    slots = {}
    if config.attention_out_bias:
        slots["out_bias"] = Slot((dim,), 0, (_M,))
    if config.attention_sink:
        slots["sink"] = Slot((config.num_query_heads,), 0, (_N,))
    return slots


OUTER = (
    *("embedding.table", "embedding.kernel", "embedding.bias"),
    *("final_norm.scale", "final_norm.bias"),
)
"""Parameters outside the layers."""

PARAMETERS = (
    *OUTER,
    *(f"{norm}_norm.{part}" for norm in ("attention", "mlp") for part in ("scale", "bias")),
    *(f"attention.{name}" for name in ("query", "key", "value", "out")),
    *(f"attention.{name}_bias" for name in ("query", "key", "value", "out")),
    *("attention.query_norm.scale", "attention.key_norm.scale", "attention.sink"),
    *(f"attention.{name}" for name in ("query_down", "query_up", "latent_down", "latent_up")),
    *("attention.query_down_bias", "attention.latent_down_bias", "attention.latent_norm.scale"),
    *(f"mlp.{name}{bias}" for name in ("gate", "up", "down") for bias in ("", "_bias")),
)
"""Parameters whose tensors a family names one by one; those of the MoE layer have patterns."""
