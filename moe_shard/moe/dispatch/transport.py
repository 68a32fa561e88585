"""Carrying rows to the experts' devices and back: the two ways that XLA has, and their gradients.

Both run inside shard_map. Each way out is the transpose of the way back, so one pair of functions
serves both passes: nothing is ever scattered, and every exchange is made once forward and once
backward. `ragged` is XLA's ragged-all-to-all, which TPU and GPU have: what crosses the wire are the
rows that were routed. `padded` is an all-to-all of equal pieces, for backends without it (CPU):
each piece is padded to a static bound and compacted on arrival.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.moe.dispatch.plan import Bound, Counts, Round, before, rows_from
from moe_shard.sharding.varying import zeros


class Transport(Protocol):
    """A way to carry rows in rounds between the devices of an expert group.

    Attributes:
        axes: the mesh axes of the group.
        rows: N, rows of a device's choices, sorted by expert.
        bound: what a round holds.
        expert_rows: R, rows of a round's buffer on the experts' side.
    """

    @property
    def axes(self) -> tuple[str, ...]:
        """See above."""
        ...

    @property
    def rows(self) -> int:
        """See above."""
        ...

    @property
    def bound(self) -> Bound:
        """See above."""
        ...

    @property
    def expert_rows(self) -> int:
        """See above."""
        ...

    def out(self, rows: Float[Array, "N M"], plan: Round) -> Float[Array, "R M"]:
        """A round of rows, sorted by expert, to the experts; padding is zero."""
        ...

    def back(
        self, rows: Float[Array, "R M"], into: Float[Array, "N M"], plan: Round
    ) -> Float[Array, "N M"]:
        """A round of rows back to where they came from; rows of other rounds stay as they are."""
        ...


def _empty(rows: int, like: Float[Array, "N M"]) -> Float[Array, "rows M"]:
    return zeros((rows, like.shape[1]), like.dtype, like)


@dataclass(frozen=True)
class RaggedTransport:
    """XLA's ragged-all-to-all; every segment goes straight to its place under its expert."""

    axes: tuple[str, ...]
    rows: int
    bound: Bound
    expert_rows: int

    def out(self, rows: Float[Array, "N M"], plan: Round) -> Float[Array, "R M"]:
        """See `Transport.out`."""
        me = jax.lax.axis_index(self.axes)
        return jax.lax.ragged_all_to_all(
            rows,
            _empty(self.expert_rows, rows),
            input_offsets=_sent(plan.sent_from, me),
            send_sizes=_sent(plan.size, me),
            output_offsets=_sent(plan.put_at, me),
            recv_sizes=_received(plan.size, me),
            axis_name=self.axes,
        )

    def back(
        self, rows: Float[Array, "R M"], into: Float[Array, "N M"], plan: Round
    ) -> Float[Array, "N M"]:
        """See `Transport.back`."""
        me = jax.lax.axis_index(self.axes)
        return jax.lax.ragged_all_to_all(
            rows,
            into,
            input_offsets=_received(plan.put_at, me),
            send_sizes=_received(plan.size, me),
            output_offsets=_received(plan.sent_from, me),
            recv_sizes=_sent(plan.size, me),
            axis_name=self.axes,
        )


@dataclass(frozen=True)
class PaddedTransport:
    """An all-to-all of pieces of equal size, that of the bound."""

    axes: tuple[str, ...]
    rows: int
    bound: Bound
    expert_rows: int

    @property
    def piece(self) -> int:
        """Rows that one device sends to one other."""
        assert self.bound.piece is not None
        return self.bound.piece

    def out(self, rows: Float[Array, "N M"], plan: Round) -> Float[Array, "R M"]:
        """See `Transport.out`."""
        me = jax.lax.axis_index(self.axes)
        pieces = pad(rows, _sent(plan.sent_from, me), plan.size[me], self.piece)
        pieces = self._exchange(pieces)
        by_expert = rows_from(
            to=_received(plan.put_at, me, by_expert=True),
            size=_received(plan.size, me, by_expert=True),
            source=_at_in_pieces(plan.size[:, me], self.piece).T.reshape(-1),
            rows=self.expert_rows,
            missing=pieces.shape[0],
        )
        return _take(pieces, by_expert)

    def back(
        self, rows: Float[Array, "R M"], into: Float[Array, "N M"], plan: Round
    ) -> Float[Array, "N M"]:
        """See `Transport.back`."""
        me = jax.lax.axis_index(self.axes)
        pieces = self._exchange(pad(rows, _received(plan.put_at, me), plan.size[:, me], self.piece))
        return compact(pieces, _sent(plan.sent_from, me), plan.size[me], self.piece, into)

    def _exchange(self, pieces: Float[Array, "DP M"]) -> Float[Array, "DP M"]:
        return jax.lax.all_to_all(pieces, self.axes, split_axis=0, concat_axis=0, tiled=True)


def pad(
    rows: Float[Array, "N M"], start: Int[Array, "Q"], size: Int[Array, "D L"], piece: int
) -> Float[Array, "DP M"]:
    """Segments, the L of a piece one behind another, each piece padded with zeros.

    Args:
        rows: where the segments are.
        start: first row of each of the D * L segments.
        size: rows of each.
        piece: P, rows of a piece.
    """
    index = rows_from(
        to=_at_in_pieces(size, piece).reshape(-1),
        size=size.reshape(-1),
        source=start,
        rows=size.shape[0] * piece,
        missing=rows.shape[0],
    )
    return _take(rows, index)


def compact(
    pieces: Float[Array, "DP M"],
    start: Int[Array, "Q"],
    size: Int[Array, "D L"],
    piece: int,
    into: Float[Array, "N M"],
) -> Float[Array, "N M"]:
    """The inverse of `pad`; rows of `into` that no segment covers stay as they are."""
    index = rows_from(
        to=start,
        size=size.reshape(-1),
        source=_at_in_pieces(size, piece).reshape(-1),
        rows=into.shape[0],
        missing=pieces.shape[0],
    )
    return jnp.where((index < pieces.shape[0])[:, None], _take(pieces, index), into)


def _at_in_pieces(size: Int[Array, "D L"], piece: int) -> Int[Array, "D L"]:
    """First row of each segment in an array of padded pieces."""
    return jnp.arange(size.shape[0], dtype=jnp.int32)[:, None] * piece + before(size)


def _sent(table: Counts, me: Int[Array, ""]) -> Int[Array, "Q"]:
    """One device's line of a table as the sender: by receiver, then by expert."""
    return table[me].reshape(-1)


def _received(table: Counts, me: Int[Array, ""], *, by_expert: bool = False) -> Int[Array, "Q"]:
    """One device's column of a table as the receiver: by sender, or by expert first."""
    mine = table[:, me]
    return (mine.T if by_expert else mine).reshape(-1)


def _take(x: Float[Array, "N M"], index: Int[Array, "R"]) -> Float[Array, "R M"]:
    """Rows by index; zero where the index is past the end."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def send(transport: Transport, rows: Float[Array, "N M"], plan: Round) -> Float[Array, "R M"]:
    """`Transport.out`, with the way back as its gradient."""
    return transport.out(rows, plan)


def _send_fwd(
    transport: Transport, rows: Float[Array, "N M"], plan: Round
) -> tuple[Float[Array, "R M"], Round]:
    return transport.out(rows, plan), plan


def _send_bwd(
    transport: Transport, plan: Round, gradient: Float[Array, "R M"]
) -> tuple[Float[Array, "N M"], None]:
    return transport.back(gradient, _empty(transport.rows, gradient), plan), None


send.defvjp(_send_fwd, _send_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def send_back(transport: Transport, rows: Float[Array, "R M"], plan: Round) -> Float[Array, "N M"]:
    """`Transport.back` into zeros, with the way out as its gradient."""
    return transport.back(rows, _empty(transport.rows, rows), plan)


def _send_back_fwd(
    transport: Transport, rows: Float[Array, "R M"], plan: Round
) -> tuple[Float[Array, "N M"], Round]:
    return send_back(transport, rows, plan), plan


def _send_back_bwd(
    transport: Transport, plan: Round, gradient: Float[Array, "N M"]
) -> tuple[Float[Array, "R M"], None]:
    return transport.out(gradient, plan), None


send_back.defvjp(_send_back_fwd, _send_back_bwd)
