"""Attend by Pallas kernels on the Triton backend, for NVIDIA and AMD.

There are three kernels (FlashAttention-2, arXiv 2307.08691), under these names in HLO:
`attention_forward`, `attention_dq`, and `attention_dkv`, whose programs add up what all query heads
of their key head give, so that no head of keys is repeated. jax's own kernel of the kind
(`jax.experimental.pallas.ops.gpu.attention`, deprecated in jax 0.12) has no windows, soft caps,
sinks, groups of heads, unequal head sizes or queries fewer than keys, and meets every earlier block
of a sequence whatever the documents.

A query sees a range of keys (`reach.py`). Of the blocks that a program meets, those between the
latest start and the earliest end of its rows' ranges need no mask. Every sum has a fixed order:
same bits every run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from moe_shard.layers.kernels.reach import Reach, in_sequence, reach_of
from moe_shard.layers.kernels.rule import (
    AttentionCase,
    AttentionRule,
    Tokens,
    named_context,
)
from moe_shard.layers.kernels.triton_blocks import (
    LARGEST_HEAD,
    LOG2_E,
    NOTHING,
    SMALLEST,
    Plan,
    Range,
    blocks_met,
    dot_tiles,
    head_pieces,
    in_reach,
    load_head,
    load_tile,
    over_blocks,
    scores_of,
    store_tile,
    zero_pieces,
)
from moe_shard.layers.kernels.triton_gradients import attention_dkv, attention_dq
from moe_shard.sharding.varying import vary_alike


def unsupported(case: AttentionCase) -> str | None:
    """Return why the kernels cannot compute a case, or None."""
    if case.platform not in ("cuda", "rocm", "cpu"):
        return f"the Triton kernels are for GPUs, not for {case.platform}"
    if jnp.dtype(case.dtype).itemsize > 4:
        return f"the Triton kernels take float32 and narrower, not {jnp.dtype(case.dtype).name}"
    if (largest := max(case.key_dim, case.value_dim)) > LARGEST_HEAD:
        return f"a head of {largest} elements; the Triton kernels hold {LARGEST_HEAD} in registers"
    return None


def attend(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T J D"],
    value: Float[Array, "B T J Dv"],
    queries: Tokens,
    keys: Tokens,
    *,
    rule: AttentionRule,
    sink: Float[Array, "N"] | None,
    platform: str,
) -> Float[Array, "B S N Dv"]:
    """Attend on one device, sums in float32, outside `jax.shard_map` or inside.

    Args:
        query: N / J consecutive heads for each key head.
        key: a whole sequence, each document in one piece.
        value: values of the same tokens.
        queries: with the place of each in the sequence, rising.
        keys: the tokens of `key`, with the place of each.
        rule: the layer's span, scale and soft cap.
        sink: for each head, the score of a token without a value; None for no sink.
        platform: "cuda" or "rocm"; on "cpu" the kernels run in Pallas's interpreter, which works
            inside `jax.shard_map` only with `check_vma=False`.
    """
    key, value, keys = in_sequence(key, value, keys)
    reach = reach_of(queries, keys, rule=rule)
    score = jnp.zeros(query.shape[2], jnp.float32) if sink is None else sink.astype(jnp.float32)
    plan = Plan(rule.scale, rule.soft_cap, sink is not None, platform)
    value_dim = value.shape[3]
    query, key, value = (_whole_head(each) for each in (query, key, value))
    query, key, value, score, *ends = vary_alike(query, key, value, score, *reach)
    return _attend(plan, query, key, value, score, Reach(*ends))[..., :value_dim]


def _whole_head(x: Float[Array, "B S N D"]) -> Float[Array, "B S N D2"]:
    """Fill the head with zeros to a multiple of the least piece."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % SMALLEST)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: Plan,
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T J D"],
    value: Float[Array, "B T J Dv"],
    sink: Float[Array, "N"],
    reach: Reach,
) -> Float[Array, "B S N Dv"]:
    return _forward(plan, query, key, value, sink, reach)[0]


def _forward(
    plan: Plan,
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T J D"],
    value: Float[Array, "B T J Dv"],
    sink: Float[Array, "N"],
    reach: Reach,
) -> tuple[Float[Array, "B S N Dv"], tuple[Any, ...]]:
    rows, tokens, heads, dim = query.shape
    places, kv_heads, value_dim = value.shape[1:]
    tile = plan.tiles(query, value).forward
    blocks = pl.cdiv(tokens, tile.rows)

    def body(
        q_ref: Any, k_ref: Any, v_ref: Any, sink_ref: Any, first_ref: Any, last_ref: Any,
        met_ref: Any, out_ref: Any, lse_ref: Any,
    ) -> None:  # fmt: skip
        # The last blocks have the most to do, so they start first.
        block, head, row = blocks - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
        kv_head = lax.div(head, jnp.int32(heads // kv_heads))
        mine = Range(block * tile.rows, tile.rows, tokens)
        q = load_head(q_ref, row, mine, head, dim)
        first, last = (load_tile(ref, (row, mine)) for ref in (first_ref, last_ref))

        def step(masked: bool, at: Int[Array, ""], carry: tuple[Any, ...]) -> tuple[Any, ...]:
            most, total, *sums = carry
            theirs = Range(at * tile.columns, tile.columns, places)
            k = load_head(k_ref, row, theirs, kv_head, dim)
            score, _ = plan.raw(scores_of(q, k))
            if masked:
                score = jnp.where(in_reach(first, last, theirs), score, NOTHING)
            higher = jnp.maximum(most, jnp.max(score, axis=1))
            weight, shrink = jnp.exp2(score - higher[:, None]), jnp.exp2(most - higher)
            v = load_head(v_ref, row, theirs, kv_head, value_dim)
            sums = [
                each * shrink[:, None] + dot_tiles(weight.astype(piece.dtype), piece, (1, 0))
                for each, piece in zip(sums, v, strict=True)
            ]
            return higher, total * shrink + jnp.sum(weight, axis=1), *sums

        start = sink_ref[head] * LOG2_E if plan.has_sink else jnp.float32(NOTHING)
        carry = (
            jnp.full((tile.rows,), start, jnp.float32),
            jnp.full((tile.rows,), float(plan.has_sink), jnp.float32),
            *zero_pieces(tile.rows, value_dim),
        )
        most, total, *sums = over_blocks(met_ref, (row, block), step, carry)
        for each, piece in zip(sums, head_pieces(value_dim), strict=True):
            store_tile(out_ref, (row, mine, head, piece), each / total[:, None])
        store_tile(lse_ref, (row, head, mine), most + jnp.log2(total))

    out, lse = plan.call(
        body,
        name="attention_forward",
        grid=(blocks, heads, rows),
        tile=tile,
        out=(((rows, tokens, heads, value_dim), value.dtype), ((rows, heads, tokens), jnp.float32)),
        like=query,
    )(query, key, value, sink, *reach, blocks_met(reach, tile, places))
    out, lse = named_context((out, lse))
    return out, (query, key, value, sink, reach, out, lse)


def _backward(plan: Plan, residuals: tuple[Any, ...], dout: Float[Array, "B S N Dv"]) -> Any:
    *_, sink, reach, out, lse = residuals
    delta = jnp.einsum("bsnd,bsnd->bns", out, dout, preferred_element_type=jnp.float32)
    given = (*residuals[:3], *reach, dout, lse, delta)
    dquery = attention_dq(plan, *given)
    dkey, dvalue = attention_dkv(plan, *given)
    dsink = jnp.zeros_like(sink)
    if plan.has_sink:
        rest = jnp.exp2(sink[:, None] * LOG2_E - lse)
        dsink = -jnp.sum(rest * delta, axis=(0, 2))
    return dquery, dkey, dvalue, dsink, None


_attend.defvjp(_forward, _backward)
