"""Pad segments to pieces of equal size for a plain all-to-all, and remove padding on arrival.

This is for backends without XLA's ragged-all-to-all (CPU). Dims as in `moe_shard.moe.exchange`, and
P, copies of a piece.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.moe.exchange.segments import exclusive_cumsum, gather_indices


def pad(
    copies: Float[Array, "N M"], start: Int[Array, "Q"], size: Int[Array, "D L"], piece: int
) -> Float[Array, "DP M"]:
    """Lay segments out in pieces, L segments one after another, and fill each piece with zeros.

    Args:
        copies: the token copies.
        start: index of the first copy of each of the D * L segments.
        size: number of copies of each.
        piece: P, copies of a piece.
    """
    index = gather_indices(
        to=_start_in_pieces(size, piece).reshape(-1),
        size=size.reshape(-1),
        source=start,
        length=size.shape[0] * piece,
        missing=copies.shape[0],
    )
    return gather_or_zero(copies, index)


def compact(
    pieces: Float[Array, "DP M"],
    start: Int[Array, "Q"],
    size: Int[Array, "D L"],
    piece: int,
    into: Float[Array, "N M"],
) -> Float[Array, "N M"]:
    """Invert `pad`; elements of `into` that no segment covers are unchanged."""
    index = gather_indices(
        to=start,
        size=size.reshape(-1),
        source=_start_in_pieces(size, piece).reshape(-1),
        length=into.shape[0],
        missing=pieces.shape[0],
    )
    return jnp.where((index < pieces.shape[0])[:, None], gather_or_zero(pieces, index), into)


def by_expert_index(
    put_at: Int[Array, "D L"], size: Int[Array, "D L"], piece: int, length: int
) -> Int[Array, "R"]:
    """Return, for every place of the experts' buffer, its index in the pieces that arrived.

    Args:
        put_at: (sender, expert) -> index of the segment's first copy in the buffer.
        size: number of copies of each segment.
        piece: P, copies of a piece.
        length: R, of the buffer.
    """
    return gather_indices(
        to=put_at.T.reshape(-1),
        size=size.T.reshape(-1),
        source=_start_in_pieces(size, piece).T.reshape(-1),
        length=length,
        missing=size.shape[0] * piece,
    )


def gather_or_zero(x: Float[Array, "N M"], index: Int[Array, "R"]) -> Float[Array, "R M"]:
    """Gather by index; zero where the index is past the end."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _start_in_pieces(size: Int[Array, "D L"], piece: int) -> Int[Array, "D L"]:
    """Return the index of each segment's first copy in an array of padded pieces."""
    first = jnp.arange(size.shape[0], dtype=jnp.int32)[:, None] * piece
    return first + exclusive_cumsum(size)
