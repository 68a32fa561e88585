"""Split tokens into blocks, and find the pairs of blocks that attention has to compute.

Dims, beside those of this package:

    I, C  blocks of queries, and tokens of one     U, K  blocks of keys, and tokens of one
    P     pairs of blocks
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from moe_shard.layers.kernels.rule import AttentionRule, Tokens

SKIP, WHOLE, PART = 0, 1, 2
"""What a pair of blocks needs: nothing, products without a mask, products with one."""

NO_QUERY, NO_KEY = -(2**30), -(2**30) - 1
"""Segment ids of what fills the last block: no document's, and not each other's."""

BlockPairs = tuple[tuple[int, int], ...]
"""(block of queries, block of keys), all pairs of one block of queries after another."""


class BlockTokens(NamedTuple):
    """Hold the tokens of blocks, as `Tokens` do of sequences.

    Attributes:
        positions: see `Tokens`.
        segment_ids: see `Tokens`.
        order: see `Tokens`; None too where it was used up, to list the pairs.
    """

    positions: Int[Array, "I B C"]
    segment_ids: Int[Array, "I B C"]
    order: Int[Array, "I C"] | None


def block_size(tokens: int, most: int) -> int:
    """Return a size of at most `most`, a multiple of 8 where there are several blocks."""
    blocks = -(-tokens // most)
    return tokens if blocks == 1 else min(most, -(-tokens // (8 * blocks)) * 8)


def split_blocks(x: Shaped[Array, "B S ..."], size: int) -> Shaped[Array, "I B C ..."]:
    """Make blocks of a number of tokens, the last one filled with zeros."""
    x = _filled(x, size, 0)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def joined_blocks(x: Shaped[Array, "I B C ..."], tokens: int) -> Shaped[Array, "B S ..."]:
    """Undo `split_blocks`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def split_tokens(tokens: Tokens, size: int, nobody: int) -> BlockTokens:
    """Split what is known of tokens; what fills the last block belongs to `nobody`."""
    order = None
    if tokens.order is not None and not isinstance(tokens.order, np.ndarray):
        # Repeat the last token's, which changes no extreme.
        short = -tokens.order.shape[0] % size
        order = jnp.pad(tokens.order, (0, short), mode="edge").reshape(-1, size)
    segments = _filled(tokens.segment_ids, size, nobody)
    return BlockTokens(split_blocks(tokens.positions, size), split_blocks(segments, size), order)


def _filled(x: Shaped[Array, "B S ..."], size: int, value: int) -> Shaped[Array, "B R ..."]:
    short = -x.shape[1] % size
    if short == 0:
        return x
    widths = ((0, 0), (0, short), *((0, 0) for _ in x.shape[2:]))
    return jnp.pad(x, widths, constant_values=value)


def list_pairs(
    queries: Tokens, keys: Tokens, sizes: tuple[int, int], *, rule: AttentionRule
) -> BlockPairs:
    """List the pairs of blocks that may have to be computed, by what is known at tracing.

    Args:
        queries: the tokens that attend.
        keys: the tokens attended to.
        sizes: tokens of a block of queries, and of keys.
        rule: the layer's span.
    """
    if not (isinstance(queries.order, np.ndarray) and isinstance(keys.order, np.ndarray)):
        blocks = (
            -(-each.positions.shape[1] // size)
            for each, size in zip((queries, keys), sizes, strict=True)
        )
        possible = np.ones(tuple(blocks), bool)
    else:
        (low, high), (key_low, key_high) = (
            _extremes(order, size)
            for order, size in zip((queries.order, keys.order), sizes, strict=True)
        )
        possible = key_low[None] <= high[:, None]
        if rule.span != "global":
            # In a document, indices differ as positions do, and chunks are shorter than a window.
            possible &= low[:, None] - key_high[None] < rule.window
    return tuple((int(i), int(u)) for i, u in np.argwhere(possible))


def _extremes(
    order: Int[np.ndarray, "S"], size: int
) -> tuple[Int[np.ndarray, "I"], Int[np.ndarray, "I"]]:
    filled = np.pad(order, (0, -len(order) % size), mode="edge").reshape(-1, size)
    return filled.min(axis=1), filled.max(axis=1)


def pair_needs(
    pairs: BlockPairs, queries: BlockTokens, keys: BlockTokens, *, rule: AttentionRule
) -> Int[Array, "P"]:
    """Return what each pair needs: SKIP, WHOLE or PART, by the extremes of its two blocks.

    Args:
        pairs: result of `list_pairs`.
        queries: the tokens that attend.
        keys: the tokens attended to.
        rule: the layer's span.
    """
    rows, columns = np.asarray(pairs).T

    def extremes(
        x: Int[Array, "I B C"], of: Int[np.ndarray, "P"]
    ) -> tuple[Int[Array, "P B"], Int[Array, "P B"]]:
        return jnp.min(x, axis=-1)[of], jnp.max(x, axis=-1)[of]

    (at, last), (of, furthest) = (
        extremes(queries.positions, rows),
        extremes(keys.positions, columns),
    )
    (first_doc, last_doc), (key_first_doc, key_last_doc) = (
        extremes(queries.segment_ids, rows),
        extremes(keys.segment_ids, columns),
    )
    some = (first_doc <= key_last_doc) & (key_first_doc <= last_doc) & (of <= last)
    every = (first_doc == last_doc) & (key_first_doc == key_last_doc) & (first_doc == key_first_doc)
    every &= furthest <= at
    if rule.span == "sliding":
        some &= at - furthest < rule.window
        every &= last - of < rule.window
    elif rule.span == "chunked":
        at, last, of, furthest = (each // rule.window for each in (at, last, of, furthest))
        some &= (at <= furthest) & (of <= last)
        every &= (at == last) & (of == furthest) & (at == of)
    needed = jnp.where(jnp.all(every, axis=1), WHOLE, PART)
    return jnp.where(jnp.any(some, axis=1) & _ordered(queries, keys, rows, columns), needed, SKIP)


def _ordered(
    queries: BlockTokens,
    keys: BlockTokens,
    rows: Int[np.ndarray, "P"],
    columns: Int[np.ndarray, "P"],
) -> Bool[Array, "P"] | bool:
    """Return whether some key of each pair is not after all of its queries."""
    if queries.order is None or keys.order is None:
        return True
    return jnp.min(keys.order, axis=1)[columns] <= jnp.max(queries.order, axis=1)[rows]
