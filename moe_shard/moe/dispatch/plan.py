"""Which row goes where in a dropless exchange: arithmetic on a table of counts, nothing else.

Every device of an expert group knows how many rows each of them sends to each expert (one small
exchange of counts); all that follows from that table is computed here, alike on every device, so
that nothing further has to be said between them.

Dims, besides those of `moe_shard.moe`:

    D  devices of the expert group, as senders or as receivers
    L  experts that live on one device, E / D
    Q  segments: runs of rows that stay together
    R  rows of a buffer; DP: of D padded pieces

Rows of a sender are sorted by expert, and experts stand in the order of the devices that own them,
so what goes to one expert of one device is one segment. A receiver wants its rows by expert, and
under one expert by sender; groups may be aligned, so that a kernel meets one expert a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

Counts = Int[Array, "D D L"]
"""Rows from each sender (first dim) to each expert (the last two: its device, its place there)."""


class Round(NamedTuple):
    """What one exchange carries; each array has a number for (sender, receiver, expert).

    Attributes:
        size: rows of the segment.
        sent_from: its first row among the sender's rows, which are sorted by expert.
        put_at: its first row among the receiver's rows, which stand by expert, then by sender.
        group_sizes: (receiver, expert) -> rows of the expert's group, its padding included.
    """

    size: Counts
    sent_from: Counts
    put_at: Counts
    group_sizes: Int[Array, "D L"]


@dataclass(frozen=True)
class Bound:
    """What one round holds; sizes that are static.

    Attributes:
        rows: of all rows that a device receives.
        piece: of those that one device sends to one other; None where no piece has a size.
    """

    rows: int
    piece: int | None = None


def before(x: Int[Array, "*dims"], axis: int = -1) -> Int[Array, "*dims"]:
    """Sum of what stands before each element."""
    return jnp.cumsum(x, axis=axis, dtype=jnp.int32) - x


def aligned(sizes: Int[Array, "*dims"], alignment: int) -> Int[Array, "*dims"]:
    """Sizes rounded up to whole blocks, at least one block, so that every group has its own."""
    if alignment == 1:
        return sizes
    return jnp.maximum(-(-sizes // alignment), 1) * alignment


def aligned_rows(rows: int, groups: int, alignment: int, multiple: int = 1) -> int:
    """Rows of a buffer that holds `rows` rows in `groups` aligned groups, however they fall.

    A multiple of `multiple`, itself one of the alignment.
    """
    if alignment > 1:
        rows = -(-rows // alignment) * alignment + groups * alignment
    return -(-rows // multiple) * multiple


def take(remaining: Counts, bound: Bound) -> Counts:
    """What a round carries of what remains: of every piece, and then of all that a device gets.

    What comes first goes first: of a receiver's rows those of its first expert, and of an expert's
    those of the first sender.
    """
    size = remaining
    if bound.piece is not None:
        size = jnp.clip(bound.piece - before(size), 0, size)
    by_receiver = size.transpose(1, 2, 0)
    ahead = before(by_receiver.reshape(by_receiver.shape[0], -1)).reshape(by_receiver.shape)
    return jnp.clip(bound.rows - ahead.transpose(2, 0, 1), 0, size)


def kept(counts: Counts, bound: Bound) -> Counts:
    """What is carried where there is one round only: every expert gives up the same share.

    Under one expert the first senders keep theirs, and of one sender's rows the first.
    """
    if bound.piece is not None:
        counts = jnp.minimum(counts, _quotas(counts, bound.piece))
    quotas = _quotas(jnp.sum(counts, axis=0), bound.rows)
    return jnp.clip(quotas - before(counts, axis=0), 0, counts)


def _quotas(wanted: Int[Array, "*D L"], room: int) -> Int[Array, "*D L"]:
    """What each expert may keep of what it wants, where all together have so much room."""
    upto = jnp.cumsum(wanted, axis=-1, dtype=jnp.int32)
    total = upto[..., -1:]
    share = room / jnp.maximum(total, 1).astype(jnp.float32)
    # Shares of sums, not sums of shares: whatever float32 rounds, together they are the room.
    rounded = jnp.minimum(jnp.floor(upto * share).astype(jnp.int32), room)
    shares = jnp.where(upto == total, room, rounded)
    return jnp.where(total <= room, wanted, jnp.diff(shares, axis=-1, prepend=0))


def plan_round(counts: Counts, size: Counts, carried: Counts | int, *, alignment: int) -> Round:
    """Where the rows of a round are and belong.

    Args:
        counts: all rows of each segment.
        size: those that this round carries.
        carried: those that rounds before it carried; they stand before them.
        alignment: groups start at multiples of it.
    """
    sorted_at = before(counts.reshape(counts.shape[0], -1)).reshape(counts.shape)
    group_sizes = aligned(jnp.sum(size, axis=0), alignment)
    return Round(
        size=size,
        sent_from=sorted_at + carried,
        put_at=before(group_sizes) + before(size, axis=0),
        group_sizes=group_sizes,
    )


def rows_from(
    *,
    to: Int[Array, "Q"],
    size: Int[Array, "Q"],
    source: Int[Array, "Q"],
    rows: int,
    missing: int,
) -> Int[Array, "R"]:
    """For every row of a new layout, the row of the old one that it is.

    Args:
        to: first row of each segment in the new layout, ascending.
        size: rows of each segment.
        source: its first row in the old layout.
        rows: R, rows of the new layout.
        missing: what to say of a row that belongs to no segment.
    """
    row = jnp.arange(rows, dtype=jnp.int32)
    segment = jnp.searchsorted(to, row, side="right", method="compare_all") - 1
    # Rows before the first segment find the last one, at a negative distance.
    within = row - to[segment]
    here = (segment >= 0) & (within < size[segment])
    return jnp.where(here, source[segment] + within, missing)
