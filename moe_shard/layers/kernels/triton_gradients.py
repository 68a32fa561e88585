"""Compute the gradients of attention by Pallas kernels on the Triton backend.

Both kernels compute the weights of a block of scores again, from the logsumexp of their rows.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Shaped

from moe_shard.layers.kernels.reach import Reach
from moe_shard.layers.kernels.triton_blocks import (
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


def attention_dq(plan: Plan, *arrays: Shaped[Array, "..."]) -> Float[Array, "B S N D"]:
    """Return the gradient of the queries: a program adds up what a block of them gets."""
    query, _, value = arrays[:3]
    reach = Reach(*arrays[3:5])
    rows, tokens, heads, dim = query.shape
    places, kv_heads, value_dim = value.shape[1:]
    tile = plan.tiles(query, value).dq
    blocks = pl.cdiv(tokens, tile.rows)

    def body(
        q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, last_ref: Any, dout_ref: Any,
        lse_ref: Any, delta_ref: Any, met_ref: Any, dq_ref: Any,
    ) -> None:  # fmt: skip
        block, head, row = blocks - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
        kv_head = lax.div(head, jnp.int32(heads // kv_heads))
        mine = Range(block * tile.rows, tile.rows, tokens)
        q = load_head(q_ref, row, mine, head, dim)
        dout = load_head(dout_ref, row, mine, head, value_dim)
        first, last = (load_tile(ref, (row, mine)) for ref in (first_ref, last_ref))
        lse, delta = (load_tile(ref, (row, head, mine)) for ref in (lse_ref, delta_ref))

        def step(masked: bool, at: Int[Array, ""], sums: tuple[Any, ...]) -> tuple[Any, ...]:
            theirs = Range(at * tile.columns, tile.columns, places)
            k = load_head(k_ref, row, theirs, kv_head, dim)
            v = load_head(v_ref, row, theirs, kv_head, value_dim)
            score, bent = plan.raw(scores_of(q, k))
            weight = jnp.exp2(score - lse[:, None])
            if masked:
                weight = jnp.where(in_reach(first, last, theirs), weight, 0.0)
            dscore = weight * (scores_of(dout, v) - delta[:, None])
            dscore = dscore if bent is None else dscore * (1 - bent * bent)
            return tuple(
                each + dot_tiles(dscore.astype(piece.dtype), piece, (1, 0))
                for each, piece in zip(sums, k, strict=True)
            )

        sums = over_blocks(met_ref, (row, block), step, zero_pieces(tile.rows, dim))
        for each, piece in zip(sums, head_pieces(dim), strict=True):
            store_tile(dq_ref, (row, mine, head, piece), each * plan.scale)

    (dquery,) = plan.call(
        body,
        name="attention_dq",
        grid=(blocks, heads, rows),
        tile=tile,
        out=((query.shape, query.dtype),),
        like=query,
    )(*arrays, blocks_met(reach, tile, places))
    found: Float[Array, "B S N D"] = dquery
    return found


def attention_dkv(
    plan: Plan, *arrays: Shaped[Array, "..."]
) -> tuple[Float[Array, "B T J D"], Float[Array, "B T J Dv"]]:
    """Return the gradients of keys and values: a program adds up what a block of them gets."""
    query, key, value = arrays[:3]
    reach = Reach(*arrays[3:5])
    rows, tokens, heads, dim = query.shape
    places, kv_heads, value_dim = value.shape[1:]
    group = heads // kv_heads
    tile = plan.tiles(query, value).dkv

    def body(
        q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, last_ref: Any, dout_ref: Any,
        lse_ref: Any, delta_ref: Any, met_ref: Any, dk_ref: Any, dv_ref: Any,
    ) -> None:  # fmt: skip
        block, kv_head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        mine = Range(block * tile.columns, tile.columns, places)
        k = load_head(k_ref, row, mine, kv_head, dim)
        v = load_head(v_ref, row, mine, kv_head, value_dim)
        parts = len(k)

        def of_head(index: Int[Array, ""], sums: tuple[Any, ...]) -> tuple[Any, ...]:
            head = kv_head * group + index

            def step(masked: bool, at: Int[Array, ""], sums: tuple[Any, ...]) -> tuple[Any, ...]:
                theirs = Range(at * tile.rows, tile.rows, tokens)
                q = load_head(q_ref, row, theirs, head, dim)
                dout = load_head(dout_ref, row, theirs, head, value_dim)
                lse, delta = (load_tile(ref, (row, head, theirs)) for ref in (lse_ref, delta_ref))
                # Of keys by queries, so that neither sum needs a transposed weight.
                score, bent = plan.raw(scores_of(k, q))
                weight = jnp.exp2(score - lse[None, :])
                if masked:
                    first, last = (load_tile(ref, (row, theirs)) for ref in (first_ref, last_ref))
                    weight = jnp.where(in_reach(first, last, mine, transposed=True), weight, 0.0)
                dscore = weight * (scores_of(v, dout) - delta[None, :])
                dscore = dscore if bent is None else dscore * (1 - bent * bent)
                given = [(dscore, each) for each in q] + [(weight, each) for each in dout]
                return tuple(
                    each + dot_tiles(by.astype(piece.dtype), piece, (1, 0))
                    for each, (by, piece) in zip(sums, given, strict=True)
                )

            return over_blocks(met_ref, (row, block), step, sums)

        zeros = zero_pieces(tile.columns, dim) + zero_pieces(tile.columns, value_dim)
        sums = lax.fori_loop(0, group, of_head, zeros)
        for each, piece in zip(sums[:parts], head_pieces(dim), strict=True):
            store_tile(dk_ref, (row, mine, kv_head, piece), each * plan.scale)
        for each, piece in zip(sums[parts:], head_pieces(value_dim), strict=True):
            store_tile(dv_ref, (row, mine, kv_head, piece), each)

    dkey, dvalue = plan.call(
        body,
        name="attention_dkv",
        grid=(pl.cdiv(places, tile.columns), kv_heads, rows),
        tile=tile,
        out=((key.shape, key.dtype), (value.shape, value.dtype)),
        like=query,
    )(*arrays, blocks_met(reach, tile, places, by_keys=True))
    return dkey, dvalue
