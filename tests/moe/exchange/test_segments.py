"""Check the arithmetic of an exchange against numbers worked out by hand and plain loops."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_shard.moe.exchange.padding import compact, pad
from moe_shard.moe.exchange.ragged_plan import Load, limits_of, longest_piece
from moe_shard.moe.exchange.segments import (
    RoundLimit,
    aligned,
    buffer_size,
    clip_to_capacity,
    clip_to_round,
    exclusive_cumsum,
    gather_indices,
    lay_out_round,
)
from moe_shard.moe.exchange.sorting import align_groups, sort_by_expert, sort_known_choices
from moe_shard.moe.router import round_robin


def expert_major(counts: list[int], alignment: int = 1) -> tuple[list[int], list[int]]:
    """Return token copies by expert on a device with 2 experts and 2 senders, and group sizes.

    The counts are r0e0, r0e1, r1e0, r1e1; copies are numbered as they arrive, sender by sender.
    The senders send as many to the other device, which changes nothing on the first.
    """
    table = jnp.stack([jnp.array(counts).reshape(2, 2)] * 2, axis=1)
    layout = lay_out_round(table, table, 0, alignment=alignment)
    sizes = layout.size[:, 0]
    arrived = exclusive_cumsum(sizes.reshape(-1)).reshape(sizes.shape)
    total = buffer_size(sum(counts), 2, alignment)
    rows = gather_indices(
        to=layout.put_at[:, 0].T.reshape(-1),
        size=sizes.T.reshape(-1),
        source=arrived.T.reshape(-1),
        length=total,
        missing=-1,
    )
    return rows.tolist(), layout.group_sizes[0].tolist()


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
    known_choices = round_robin(tokens=5, k=3, num_experts=4)
    assert known_choices.tolist() == (np.arange(15).reshape(5, 3) % 4).tolist()
    assert sort_known_choices(known_choices, 4).counts.tolist() == [4, 4, 4, 3]


def test_analytic_splits_are_the_counted_ones() -> None:
    # 36 experts on 12 devices, 5 sequences of 31 tokens, top-3: 36 does not divide 93 = 31 * 3.
    row = round_robin(tokens=31, k=3, num_experts=36)
    known_choices = np.tile(row, (5, 1))
    known, counted = (
        sort_known_choices(known_choices, 36),
        sort_by_expert(jnp.asarray(known_choices), 36),
    )
    assert known.counts.tolist() == np.bincount(known_choices.reshape(-1), minlength=36).tolist()
    for mine, other in zip(known.slots + known[1:], counted.slots + counted[1:], strict=True):
        np.testing.assert_array_equal(mine, other)
    load = Load(tokens=155, k=3, devices=12, experts=3)
    pieces = known.counts.reshape(12, 3).sum(axis=1)
    assert len(set(pieces.tolist())) > 1
    assert longest_piece(known_choices[None], load) == pieces.max()


tables = st.tuples(st.integers(1, 4), st.integers(1, 3)).flatmap(
    lambda sizes: st.lists(
        st.integers(0, 9), min_size=sizes[0] ** 2 * sizes[1], max_size=sizes[0] ** 2 * sizes[1]
    ).map(lambda flat: np.array(flat).reshape(sizes[0], sizes[0], sizes[1]))
)


@partial(jax.jit, static_argnames=("limit", "alignment"))
def _one_round(table: jax.Array, carried: jax.Array, limit: RoundLimit, alignment: int) -> Any:
    size = clip_to_round(table - carried, limit)
    return size, lay_out_round(table, size, carried, alignment=alignment)


def one_round(table: jax.Array, carried: jax.Array, limit: RoundLimit, alignment: int) -> Any:
    """Return what a round sends and its layout, as NumPy, whose elements are quick to read."""
    return jax.tree.map(np.asarray, _one_round(table, carried, limit, alignment))


@settings(max_examples=60)
@given(
    tables,
    st.sampled_from([1, 2, 5, 12]),
    st.none() | st.sampled_from([1, 3, 6]),
    st.sampled_from([1, 4]),
)
def test_rounds_send_every_copy_once_and_to_its_expert(
    counts: np.ndarray, rows: int, piece: int | None, alignment: int
) -> None:
    limit = RoundLimit(rows, piece)
    table = jnp.asarray(counts, jnp.int32)
    devices, _, experts = counts.shape
    carried = jnp.zeros_like(table)
    seen: list[tuple[int, int]] = []
    while (np.asarray(carried) < counts).any():
        size, layout = one_round(table, carried, limit, alignment)
        held: dict[tuple[int, int], tuple[int, int]] = {}
        assert 0 < size.sum(axis=(0, 2)).max() <= rows
        assert piece is None or size.sum(axis=2).max() <= piece
        for sender, receiver, expert in np.ndindex(*counts.shape):
            start = counts[sender].reshape(-1)[: receiver * experts + expert].sum()
            for row in range(int(size[sender, receiver, expert])):
                at = int(layout.sent_from[sender, receiver, expert]) + row
                assert start <= at < start + counts[sender, receiver, expert]
                seen.append((sender, at))
                place = int(layout.put_at[sender, receiver, expert]) + row
                group = int(layout.group_sizes[receiver, :expert].sum())
                assert group <= place < group + int(layout.group_sizes[receiver, expert])
                assert held.setdefault((receiver, place), (sender, at)) == (sender, at)
        assert (layout.group_sizes % alignment == 0).all()
        assert len(held) == int(size.sum())
        carried = carried + size
    assert sorted(seen) == [
        (sender, at) for sender in range(devices) for at in range(counts[sender].sum())
    ]


clipped = jax.jit(clip_to_capacity, static_argnames="limit")


@settings(max_examples=60)
@given(tables, st.sampled_from([1, 2, 5, 12, 30]), st.booleans())
def test_what_is_clipped_fits_and_every_expert_gives_up_the_same_fraction(
    counts: np.ndarray, room: int, pieces: bool
) -> None:
    limit = RoundLimit(10**6, room) if pieces else RoundLimit(room)
    carried = np.asarray(clipped(jnp.asarray(counts, jnp.int32), limit))
    assert (carried <= counts).all()
    axes = 2 if pieces else (0, 2)
    totals, sums = counts.sum(axis=axes), carried.sum(axis=axes)
    assert (sums == np.minimum(totals, room)).all()
    # An expert loses less than one token copy beyond its proportional part.
    shares = counts if pieces else counts.sum(axis=0)
    mine = carried if pieces else carried.sum(axis=0)
    allowed = shares * np.minimum(1, room / np.maximum(totals, 1))[..., None]
    assert (mine > allowed - 1 - 1e-3).all()


def test_what_is_clipped_fits_where_float32_rounds_up() -> None:
    # Above 2**24 float32 has no odd numbers: the first expert's part comes out as 82,534,208.
    room = 82_534_207
    counts = jnp.array([[[room + 2, 1]]], jnp.int32)
    assert clip_to_capacity(counts, RoundLimit(room)).tolist() == [[[room, 0]]]


@partial(jax.jit, static_argnames=("alignment", "length"))
def _sort_and_align(indices: jax.Array, alignment: int, length: int) -> Any:
    order = sort_by_expert(indices, 5)
    return order, *align_groups(order, indices, alignment=alignment, length=length)


def sort_and_align(indices: jax.Array, alignment: int, length: int) -> Any:
    """Return the order by expert, its aligned slots and their groups' sizes, as NumPy."""
    return jax.tree.map(np.asarray, _sort_and_align(indices, alignment, length))


# Of few lengths: each is a program.
choices = st.sampled_from([1, 2, 7, 30]).flatmap(
    lambda length: st.lists(st.integers(0, 4), min_size=length, max_size=length)
)


@settings(max_examples=60)
@given(choices, st.sampled_from([1, 8]))
def test_the_order_by_expert_is_a_stable_sort(experts: list[int], alignment: int) -> None:
    indices = jnp.array(experts)[:, None]
    length = buffer_size(len(experts), 5, alignment)
    order, slots, sizes = sort_and_align(indices, alignment, length)
    expected = sorted(range(len(experts)), key=lambda choice: experts[choice])
    assert order.slots.choice_of_slot[0].tolist() == expected
    assert (sizes % alignment == 0).all()
    assert int(sizes.sum()) <= slots.choice_of_slot.shape[1]
    for choice, place in enumerate(slots.slot_of_choice[0, :, 0].tolist()):
        assert slots.choice_of_slot[0, place] == choice
        start = int(sizes[: experts[choice]].sum())
        assert start <= place < start + int(sizes[experts[choice]])
    filled = int((slots.choice_of_slot[0] < len(experts)).sum())
    assert filled == len(experts)  # the rest are padding


def test_the_limits_of_rounds() -> None:
    load = Load(tokens=4096, k=2, devices=8, experts=1)
    # ceil(8192 * 33/32 + 4 * sqrt(8192)) rows, ceil(1024 * 33/32 + 4 * sqrt(1024)) of a piece.
    assert limits_of(load, padded=False, factor=-1) == (RoundLimit(8811), RoundLimit(1024))
    assert limits_of(load, padded=True, factor=-1) == (
        RoundLimit(8811, 1184),
        RoundLimit(1024, 128),
    )
    assert limits_of(load, padded=False, factor=1.5) == (RoundLimit(12288), None)
    assert limits_of(load, padded=True, factor=1.5) == (RoundLimit(12288, 1536), None)
    # Where one round can hold every token copy, there is no second round.
    alone = Load(tokens=4096, k=2, devices=1, experts=8)
    assert limits_of(alone, padded=False, factor=-1) == (RoundLimit(8192), None)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("copies", range(1, 14))
def test_a_buffer_holds_every_distribution_and_some_fill_it(copies: int, groups: int) -> None:
    alignment = 4
    room = buffer_size(copies, groups, alignment)
    largest = 0
    for cuts in itertools.combinations_with_replacement(range(copies + 1), groups - 1):
        bounds = (0, *cuts, copies)
        counts = [end - start for start, end in itertools.pairwise(bounds)]
        largest = max(largest, sum(max(-(-n // alignment), 1) * alignment for n in counts))
    assert largest == room
