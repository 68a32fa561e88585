"""Compute where each token copy goes in a dropless exchange: arithmetic on a table of counts.

Every device of an expert group knows how many copies each of them sends to each expert (one small
exchange of counts); all that follows from that table is computed here, alike on every device, so
that no further communication is needed. Dims as in `moe_shard.moe.exchange`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

Counts = Int[Array, "D D L"]
"""Copies from each sender (first dim) to each expert (its device, its number there)."""


class RoundLayout(NamedTuple):
    """Where the copies of one round are and belong.

    Arrays of type `Counts` have a number for (sender, receiver, expert).

    Attributes:
        size: copies of the segment.
        sent_from: its first copy among the sender's, which are sorted by expert.
        put_at: its first copy among the receiver's, which are by expert, then by sender.
        group_sizes: (receiver, expert) -> copies of the expert's group, its padding included.
    """

    size: Counts
    sent_from: Counts
    put_at: Counts
    group_sizes: Int[Array, "D L"]


@dataclass(frozen=True)
class RoundLimit:
    """What one round holds; sizes that are static.

    Attributes:
        copies: of all copies that a device receives.
        piece: of those that one device sends to one other; None where pieces have no size.
    """

    copies: int
    piece: int | None = None


def exclusive_cumsum(x: Int[Array, "*dims"], axis: int = -1) -> Int[Array, "*dims"]:
    """Sum what precedes each element along an axis."""
    return jnp.cumsum(x, axis=axis, dtype=jnp.int32) - x


def aligned(sizes: Int[Array, "*dims"], alignment: int) -> Int[Array, "*dims"]:
    """Round sizes up to whole blocks, at least one block, so that every group has its own."""
    if alignment == 1:
        return sizes
    return jnp.maximum(-(-sizes // alignment), 1) * alignment


def buffer_size(copies: int, groups: int, alignment: int, multiple: int = 1) -> int:
    """Return R of a buffer that holds `copies` in `groups` aligned groups, however they fall.

    A multiple of `multiple`, itself one of the alignment.
    """
    if alignment > 1:
        copies = -(-copies // alignment) * alignment + groups * alignment
    return -(-copies // multiple) * multiple


def clip_to_round(remaining: Counts, limit: RoundLimit) -> Counts:
    """Clip what remains to one round: every piece, and then all that a device receives.

    What comes first goes first: of a receiver's copies those of its first expert, and of an
    expert's those of the first sender.
    """
    size = remaining
    if limit.piece is not None:
        size = jnp.clip(limit.piece - exclusive_cumsum(size), 0, size)
    by_receiver = size.transpose(1, 2, 0)
    ahead = exclusive_cumsum(by_receiver.reshape(by_receiver.shape[0], -1))
    ahead = ahead.reshape(by_receiver.shape)
    return jnp.clip(limit.copies - ahead.transpose(2, 0, 1), 0, size)


def clip_to_capacity(counts: Counts, limit: RoundLimit) -> Counts:
    """Clip all that is to be sent to the one round there is; the rest is dropped.

    Every expert gives up the same fraction. Under one expert the first senders keep theirs, and of
    one sender's copies the first.
    """
    if limit.piece is not None:
        counts = jnp.minimum(counts, _capacities(counts, limit.piece))
    capacities = _capacities(jnp.sum(counts, axis=0), limit.copies)
    return jnp.clip(capacities - exclusive_cumsum(counts, axis=0), 0, counts)


def _capacities(wanted: Int[Array, "*D L"], room: int) -> Int[Array, "*D L"]:
    """Divide the room among experts in proportion to what each wants."""
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
    """Compute where the copies of a round are and belong.

    Args:
        counts: all copies of each segment.
        size: those that this round sends.
        sent_before: those that rounds before it sent; they precede them in the segment.
        alignment: groups start at multiples of it.
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
    """Return, for every place of a new layout, the place in the old one that fills it.

    Args:
        to: first place of each segment in the new layout, ascending.
        size: copies of each segment.
        source: its first place in the old layout.
        length: R, of the new layout.
        missing: the index for a place that belongs to no segment.
    """
    place = jnp.arange(length, dtype=jnp.int32)
    segment = jnp.searchsorted(to, place, side="right", method="compare_all") - 1
    # Places before the first segment find the last one, at a negative distance.
    within = place - to[segment]
    inside = (segment >= 0) & (within < size[segment])
    return jnp.where(inside, source[segment] + within, missing)
