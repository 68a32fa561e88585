"""The arithmetic of an exchange, against numbers worked out by hand and against plain loops."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_shard.moe.dispatch.plan import (
    Bound,
    aligned,
    aligned_rows,
    before,
    kept,
    plan_round,
    rows_from,
    take,
)
from moe_shard.moe.dispatch.ragged import Load, bounds_of, longest_piece
from moe_shard.moe.dispatch.seating import at_aligned_groups, seat, seat_known
from moe_shard.moe.dispatch.transport import compact, pad
from moe_shard.moe.router import round_robin


def expert_major(counts: list[int], alignment: int = 1) -> tuple[list[int], list[int]]:
    """Rows in the order in which a device with 2 experts gets them from 2 senders, and groups.

    The counts are r0e0, r0e1, r1e0, r1e1; rows are numbered as they arrive, sender by sender.
    The senders send as many to the other device, which changes nothing on the first.
    """
    table = jnp.stack([jnp.array(counts).reshape(2, 2)] * 2, axis=1)
    plan = plan_round(table, table, 0, alignment=alignment)
    sizes = plan.size[:, 0]
    arrived = before(sizes.reshape(-1)).reshape(sizes.shape)
    total = aligned_rows(sum(counts), 2, alignment)
    rows = rows_from(
        to=plan.put_at[:, 0].T.reshape(-1),
        size=sizes.T.reshape(-1),
        source=arrived.T.reshape(-1),
        rows=total,
        missing=-1,
    )
    return rows.tolist(), plan.group_sizes[0].tolist()


@pytest.mark.parametrize(
    ("counts", "order", "groups"),
    [
        ([2, 3, 1, 4], [0, 1, 5, 2, 3, 4, 6, 7, 8, 9], [3, 7]),
        ([0, 3, 2, 0], [3, 4, 0, 1, 2], [2, 3]),
        ([0, 0, 0, 0], [], [0, 0]),
    ],
)
def test_rank_major_to_expert_major(counts: list[int], order: list[int], groups: list[int]) -> None:
    assert expert_major(counts) == (order, groups)


def test_groups_aligned_to_8() -> None:
    rows, groups = expert_major([2, 3, 1, 4], alignment=8)
    assert groups == [8, 8]
    assert rows[:16] == [0, 1, 5, -1, -1, -1, -1, -1, 2, 3, 4, 6, 7, 8, 9, -1]
    assert set(rows[16:]) <= {-1}


def test_an_empty_expert_has_a_block_of_padding() -> None:
    rows, groups = expert_major([0, 3, 0, 4], alignment=8)
    assert groups == [8, 8]
    assert set(rows[:8]) == {-1}
    assert aligned(jnp.array([0, 1, 8, 9]), 8).tolist() == [8, 8, 8, 16]


def test_pad_and_compact() -> None:
    x = jnp.arange(1.0, 6.0)[:, None]
    size, start = jnp.array([[2], [1], [2]]), jnp.array([0, 2, 3])
    padded = pad(x, start, size, 2)
    assert padded[:, 0].tolist() == [1, 2, 3, 0, 4, 5]
    assert compact(padded, start, size, 2, jnp.zeros_like(x)).tolist() == x.tolist()


def test_force_balance() -> None:
    dealt = round_robin(tokens=5, k=3, num_experts=4)
    assert dealt.tolist() == (np.arange(15).reshape(5, 3) % 4).tolist()
    assert seat_known(dealt, 4).counts.tolist() == [4, 4, 4, 3]


def test_analytic_splits_are_the_counted_ones() -> None:
    # 36 experts on 12 devices, 5 rows of 31 tokens, top-3: 36 do not divide the 93 of a row.
    row = round_robin(tokens=31, k=3, num_experts=36)
    dealt = np.tile(row, (5, 1))
    known, counted = seat_known(dealt, 36), seat(jnp.asarray(dealt), 36)
    assert known.counts.tolist() == np.bincount(dealt.reshape(-1), minlength=36).tolist()
    for mine, other in zip(known.slots + known[1:], counted.slots + counted[1:], strict=True):
        np.testing.assert_array_equal(mine, other)
    load = Load(tokens=155, k=3, devices=12, experts=3)
    pieces = known.counts.reshape(12, 3).sum(axis=1)
    assert len(set(pieces.tolist())) > 1
    assert longest_piece(dealt[None], load) == pieces.max()


tables = st.tuples(st.integers(1, 4), st.integers(1, 3)).flatmap(
    lambda sizes: st.lists(
        st.integers(0, 9), min_size=sizes[0] ** 2 * sizes[1], max_size=sizes[0] ** 2 * sizes[1]
    ).map(lambda flat: np.array(flat).reshape(sizes[0], sizes[0], sizes[1]))
)


@settings(max_examples=60, deadline=None)
@given(tables, st.integers(1, 12), st.none() | st.integers(1, 6), st.sampled_from([1, 4]))
def test_rounds_carry_every_row_once_and_to_its_expert(
    counts: np.ndarray, rows: int, piece: int | None, alignment: int
) -> None:
    bound = Bound(rows, piece)
    table = jnp.asarray(counts, jnp.int32)
    devices, _, experts = counts.shape
    carried = jnp.zeros_like(table)
    seen: list[tuple[int, int]] = []
    while (np.asarray(carried) < counts).any():
        size = take(table - carried, bound)
        plan = plan_round(table, size, carried, alignment=alignment)
        held: dict[tuple[int, int], tuple[int, int]] = {}
        assert 0 < np.asarray(size).sum(axis=(0, 2)).max() <= rows
        assert piece is None or np.asarray(size).sum(axis=2).max() <= piece
        for sender, receiver, expert in np.ndindex(*counts.shape):
            start = counts[sender].reshape(-1)[: receiver * experts + expert].sum()
            for row in range(int(size[sender, receiver, expert])):
                at = int(plan.sent_from[sender, receiver, expert]) + row
                assert start <= at < start + counts[sender, receiver, expert]
                seen.append((sender, at))
                place = int(plan.put_at[sender, receiver, expert]) + row
                group = int(np.asarray(plan.group_sizes[receiver])[:expert].sum())
                assert group <= place < group + int(plan.group_sizes[receiver, expert])
                assert held.setdefault((receiver, place), (sender, at)) == (sender, at)
        assert (np.asarray(plan.group_sizes) % alignment == 0).all()
        assert len(held) == int(size.sum())
        carried = carried + size
    assert sorted(seen) == [
        (sender, at) for sender in range(devices) for at in range(counts[sender].sum())
    ]


@settings(max_examples=60, deadline=None)
@given(tables, st.integers(1, 30), st.booleans())
def test_what_is_kept_fits_and_is_shared(counts: np.ndarray, room: int, pieces: bool) -> None:
    bound = Bound(10**6, room) if pieces else Bound(room)
    carried = np.asarray(kept(jnp.asarray(counts, jnp.int32), bound))
    assert (carried <= counts).all()
    axes = 2 if pieces else (0, 2)
    totals, sums = counts.sum(axis=axes), carried.sum(axis=axes)
    assert (sums == np.minimum(totals, room)).all()
    # An expert loses less than one row beyond its share.
    shares = counts if pieces else counts.sum(axis=0)
    mine = carried if pieces else carried.sum(axis=0)
    allowed = shares * np.minimum(1, room / np.maximum(totals, 1))[..., None]
    assert (mine > allowed - 1 - 1e-3).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.sampled_from([1, 8]))
def test_seats_are_a_stable_sort(experts: list[int], alignment: int) -> None:
    indices = jnp.array(experts)[:, None]
    seating = seat(indices, 5)
    order = sorted(range(len(experts)), key=lambda choice: experts[choice])
    assert seating.slots.choice_of_slot[0].tolist() == order
    slots, sizes = at_aligned_groups(
        seating, indices, alignment=alignment, rows=aligned_rows(len(experts), 5, alignment)
    )
    assert (sizes % alignment == 0).all()
    assert int(sizes.sum()) <= slots.choice_of_slot.shape[1]
    for choice, place in enumerate(slots.slot_of_choice[0, :, 0].tolist()):
        assert slots.choice_of_slot[0, place] == choice
        start = int(sizes[: experts[choice]].sum())
        assert start <= place < start + int(sizes[experts[choice]])
    filled = int((slots.choice_of_slot[0] < len(experts)).sum())
    assert filled == len(experts)  # the rest are padding


def test_the_bounds_of_rounds() -> None:
    load = Load(tokens=4096, k=2, devices=8, experts=1)
    # ceil(8192 * 33/32 + 4 * sqrt(8192)) rows, ceil(1024 * 33/32 + 4 * sqrt(1024)) of a piece.
    assert bounds_of(load, padded=False, factor=-1) == (Bound(8811), Bound(1024))
    assert bounds_of(load, padded=True, factor=-1) == (Bound(8811, 1184), Bound(1024, 128))
    assert bounds_of(load, padded=False, factor=1.5) == (Bound(12288), None)
    assert bounds_of(load, padded=True, factor=1.5) == (Bound(12288, 1536), None)
    # Where a round can hold all that there may be, there is no other.
    alone = Load(tokens=4096, k=2, devices=1, experts=8)
    assert bounds_of(alone, padded=False, factor=-1) == (Bound(8192), None)
