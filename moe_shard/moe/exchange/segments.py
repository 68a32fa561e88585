"""Compute where each token copy goes in a dropless exchange, from a table of counts.

Every device of an expert group knows how many copies each of them sends to each expert (one small
exchange of counts). What follows from that table is computed here, the same on every device, so
that no further communication is needed. Dims as in `moe_shard.moe.exchange`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

Counts = Int[Array, "D D L"]
"""Copies from each sender (first dim) to each expert (device, and number on it)."""


class RoundLayout(NamedTuple):
    """Describe where the copies of one round are and where they go.

    Arrays of type `Counts` have a number for (sender, receiver, expert).

    Attributes:
        size: number of copies of the segment.
        sent_from: index of its first copy among the sender's, which are sorted by expert.
        put_at: index of its first copy among the receiver's, which are sorted by expert, then by
            sender.
        group_sizes: (receiver, expert) -> copies of the expert's group, its padding included.
    """

    size: Counts
    sent_from: Counts
    put_at: Counts
    group_sizes: Int[Array, "D L"]


@dataclass(frozen=True)
class RoundLimit:
    """Hold the static limits of one round.

    Attributes:
        copies: copies that a device receives in all.
        piece: copies that one device sends to another; None where pieces have no size.
    """

    copies: int
    piece: int | None = None


def exclusive_cumsum(x: Int[Array, "*dims"], axis: int = -1) -> Int[Array, "*dims"]:
    """Sum what precedes each element along an axis."""
    return jnp.cumsum(x, axis=axis, dtype=jnp.int32) - x


def aligned(sizes: Int[Array, "*dims"], alignment: int) -> Int[Array, "*dims"]:
    """Round sizes up to whole blocks, at least one, so that every group has a block of its own."""
    if alignment == 1:
        return sizes
    return jnp.maximum(-(-sizes // alignment), 1) * alignment


def buffer_size(copies: int, groups: int, alignment: int, multiple: int = 1) -> int:
    """Return R for `copies` in `groups` aligned groups, however they are distributed.

    It is a multiple of `multiple`, which is a multiple of the alignment. The worst distribution has
    one copy in the last block of each group but one, or none in all groups but one.
    """
    if alignment > 1:
        blocks = max(-(-copies // alignment), 1) + groups - 1
        copies = blocks * alignment
    return -(-copies // multiple) * multiple


def clip_to_round(remaining: Counts, limit: RoundLimit) -> Counts:
    """Clip the remaining copies to one round: first each piece, then all that a device receives.

    The first copies go first: a receiver's are ordered by expert, and an expert's by sender.
    """
    size = remaining
    if limit.piece is not None:
        size = jnp.clip(limit.piece - exclusive_cumsum(size), 0, size)
    by_receiver = size.transpose(1, 2, 0)
    ahead = exclusive_cumsum(by_receiver.reshape(by_receiver.shape[0], -1))
    ahead = ahead.reshape(by_receiver.shape)
    return jnp.clip(limit.copies - ahead.transpose(2, 0, 1), 0, size)


def clip_to_capacity(counts: Counts, limit: RoundLimit) -> Counts:
    """Clip the copies to the capacity of the single round; the rest is dropped.

    Every expert drops the same fraction. It keeps the copies of the first senders, and the first
    ones of a sender.
    """
    if limit.piece is not None:
        counts = jnp.minimum(counts, _capacities(counts, limit.piece))
    capacities = _capacities(jnp.sum(counts, axis=0), limit.copies)
    return jnp.clip(capacities - exclusive_cumsum(counts, axis=0), 0, counts)


def _capacities(wanted: Int[Array, "*D L"], room: int) -> Int[Array, "*D L"]:
    """Divide the capacity among experts in proportion to what is sent to each."""
    upto = jnp.cumsum(wanted, axis=-1, dtype=jnp.int32)
    total = upto[..., -1:]
    fraction = room / jnp.maximum(total, 1).astype(jnp.float32)
    # Differences of rounded sums, not rounded differences: whatever float32 rounds, they add up to
    # the room. Above 2**24 a sum may round up to more than the room, hence the clamp.
    rounded = jnp.minimum(jnp.floor(upto * fraction).astype(jnp.int32), room)
    ends = jnp.where(upto == total, room, rounded)
    return jnp.where(total <= room, wanted, jnp.diff(ends, axis=-1, prepend=0))


def lay_out_round(
    counts: Counts, size: Counts, sent_before: Counts | int, *, alignment: int
) -> RoundLayout:
    """Compute where the copies of a round are and where they go.

    Args:
        counts: number of copies of each segment in all rounds.
        size: number of copies that this round sends.
        sent_before: number of copies that earlier rounds sent; they precede these in the segment.
        alignment: groups start at multiples of this.
    """
    sorted_at = exclusive_cumsum(counts.reshape(counts.shape[0], -1)).reshape(counts.shape)
    group_sizes = aligned(jnp.sum(size, axis=0), alignment)
    return RoundLayout(
        size=size,
        sent_from=sorted_at + sent_before,
        put_at=exclusive_cumsum(group_sizes) + exclusive_cumsum(size, axis=0),
        group_sizes=group_sizes,
    )


def gather_indices(
    *,
    to: Int[Array, "Q"],
    size: Int[Array, "Q"],
    source: Int[Array, "Q"],
    length: int,
    missing: int,
) -> Int[Array, "R"]:
    """Return, for every place of a new layout, the index in the old one that fills it.

    Args:
        to: index of each segment's first copy in the new layout, ascending.
        size: number of copies of each segment.
        source: index of its first copy in the old layout.
        length: R, of the new layout.
        missing: the index for a place that belongs to no segment.
    """
    place = jnp.arange(length, dtype=jnp.int32)
    segment = jnp.searchsorted(to, place, side="right", method="compare_all") - 1
    # Places before the first segment find the last one, at a negative distance.
    within = place - to[segment]
    inside = (segment >= 0) & (within < size[segment])
    return jnp.where(inside, source[segment] + within, missing)
