"""Record how attention is computed, and why not otherwise: printed before step 0, used in tests.

A record follows from configuration, mesh and shapes alone; nothing has to be traced for it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from moe_shard.config.model_config import LayerKind, ModelConfig
from moe_shard.layers.kernels.load_balance import order_tokens
from moe_shard.layers.kernels.on_mesh import plan_attention
from moe_shard.layers.kernels.rule import AttentionRule
from moe_shard.layers.sparse_attention import BLOCK
from moe_shard.sharding.annotate import Sharding
from moe_shard.units import human_ranges


@dataclass(frozen=True)
class AttentionRecord:
    """Describe how the attention of some layers is computed.

    Attributes:
        implementation: a value of `attention`, without "autoselected".
        reason: why that one.
        scores: which tokens are seen and what happens to scores, such as "sliding 4096, sinks".
        context: how tokens of a sequence on other devices are reached; "none" where each device
            has all of its sequences' tokens; and the order of tokens then.
        not_taken: implementation that is faster where it runs -> why not here.
    """

    implementation: str
    reason: str
    scores: str
    context: str
    not_taken: dict[str, str]

    def lines(self, layers: str) -> list[str]:
        """Return the record as lines for people.

        Args:
            layers: the layers that this is about, such as "layers 0-31".
        """
        refused = ", ".join(f"{name} ({why})" for name, why in self.not_taken.items())
        return [
            f"attention in {layers}: {self.implementation} ({self.reason}), scores: {self.scores}, "
            f"context: {self.context}",
            *([f"  not taken: {refused}"] if refused else []),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return a value of the object `attention` of `lowering.json`."""
        return asdict(self)


def attention_records(
    config: ModelConfig, sharding: Sharding, tokens: tuple[int, int]
) -> dict[str, AttentionRecord]:
    """Return {layers: their record} for training, one for all layers that attend alike.

    Layers without attention have none.

    Args:
        config: the model.
        sharding: the mesh and its rules.
        tokens: [B S], of a microbatch on all devices together.

    Raises:
        UserError: as the layers' calls.
    """
    layers = defaultdict(list)
    for number, kind in enumerate(config.all_layer_kinds):
        if kind.mixer == "attention":
            layers[kind.span].append((number, kind))
    return {
        _named([number for number, _ in alike]): _record(config, alike[0][1], sharding, tokens)
        for alike in layers.values()
    }


def _named(numbers: list[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {human_ranges(numbers)}"


def _record(
    config: ModelConfig, kind: LayerKind, sharding: Sharding, tokens: tuple[int, int]
) -> AttentionRecord:
    attention = config.attention.in_layers(kind.span)
    rule = AttentionRule.of(attention, kind.span)
    kv_heads, key_dim, value_dim = attention.num_kv_heads, attention.head_dim, attention.head_dim
    latent = attention.attention_type == "mla"
    gathers_latents = latent and attention.context_parallel_strategy == "all_gather"
    if latent:
        kv_heads, value_dim = attention.num_query_heads, attention.v_head_dim
        key_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    kernel, shards = plan_attention(
        attention,
        rule,
        sharding,
        (*tokens, attention.num_query_heads, key_dim),
        (*tokens, kv_heads, key_dim),
        value_dim,
        dtype=config.dtype,
        key_length="activation_kv_length" if gathers_latents else "activation_length",
        same_tokens=True,
    )
    context, axes = "none", ", ".join(shards.length)
    order = order_tokens(config, sharding, tokens[1])
    if shards.is_ring:
        context = f"keys and values pass round {axes}"
    elif shards.size(shards.length) > 1:
        what = "latents" if gathers_latents else "keys and values"
        context = f"{what} gathered over {axes}"
    if order.reason:
        context += f"; tokens {'in the order of the text' if order.order is None else 'reordered'}"
        context += f" ({order.reason})"
    scores = _scores_in_words(rule, sink=attention.attention_sink)
    if attention.use_indexer and tokens[1] > attention.indexer_topk:
        return AttentionRecord(
            implementation="sparse",
            reason=f"an indexer chooses {attention.indexer_topk} of {tokens[1]} tokens",
            scores=f"{scores}, under a mask: {BLOCK} x {tokens[1]} a head at once, in float32",
            context=context,
            not_taken={"kernels": "they know no mask for each pair of tokens"},
        )
    reason = kernel.reason
    if attention.use_indexer:
        reason += f"; {tokens[1]} tokens are at most indexer_topk={attention.indexer_topk}: all"
    return AttentionRecord(
        implementation=kernel.name,
        reason=reason,
        scores=scores,
        context=context,
        not_taken=dict(kernel.refused),
    )


def _scores_in_words(rule: AttentionRule, *, sink: bool) -> str:
    words = [rule.span if rule.span == "global" else f"{rule.span} {rule.window}"]
    if rule.soft_cap:
        words.append(f"soft cap {rule.soft_cap:g}")
    if sink:
        words.append("sinks")
    return ", ".join(words)
