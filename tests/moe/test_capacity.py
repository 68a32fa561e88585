"""Check capacity and slot assignment against published examples and a plain loop."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_shard.config.moe_config import CapacityRule, DropPolicy
from moe_shard.moe.capacity import expert_capacity
from moe_shard.moe.slots import Slots, assign_slots
from tests.moe.oracle import Settings, layer_capacity, seat, top_k

LOGITS = np.array(
    [
        [0.11, 0.2, 0.1, 0.3],
        [0.3, 0.4, 0.11, 0.1],
        [0.11, 0.1, 0.6, 0.5],
        [0.1, 0.11, 0.7, 0.8],
    ]
)
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
KEPT = {
    "position": {(0, 1, 0), (0, 3, 0), (1, 0, 0), (1, 1, 1), (2, 2, 0), (2, 3, 1), (3, 2, 1)},
    "probability": {(0, 1, 0), (1, 0, 0), (1, 1, 1), (2, 2, 0), (2, 3, 0), (3, 2, 1), (3, 3, 1)},
}


def seated(slots: Slots, indices: np.ndarray, capacity: int) -> list[set[tuple[int, int, int]]]:
    """Return, per sequence, (token, expert, slot) of each kept choice, by the choices' pointers."""
    rows: list[set[tuple[int, int, int]]] = []
    for row, kept in zip(
        np.asarray(slots.slot_of_choice), np.asarray(slots.has_slot()), strict=True
    ):
        rows.append(set())
        for token, i in np.argwhere(kept).tolist():
            expert, slot = divmod(int(row[token, i]), capacity)
            assert expert == indices[len(rows) - 1, token, i]
            rows[-1].add((token, expert, slot))
    return rows


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "minimum", "slots"),
    [(8, 2, 2, 2.0, 0, 16), (3, 4, 1, 8.0, 0, 6), (4, 2, 1, 1.0, 8, 8)],
)
def test_gshard_capacity(
    tokens: int, experts: int, k: int, factor: float, minimum: int, slots: int
) -> None:
    found = expert_capacity(
        tokens=tokens, num_experts=experts, k=k, factor=factor, rule="gshard", minimum=minimum
    )
    assert found == slots


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "slots"),
    [
        (128, 8, 2, 1.0, 32),
        (128, 8, 2, 1.25, 40),
        (10, 4, 1, 1.5, 4),  # ceil(2.5) = 3, times 1.5 = 4.5, rounded down
        (3, 8, 2, 4.0, 4),  # ceil(0.75) = 1
        (100, 7, 3, 0.5, 21),  # ceil(42.86) = 43, halved, rounded down
    ],
)
def test_maxtext_capacity(tokens: int, experts: int, k: int, factor: float, slots: int) -> None:
    assert expert_capacity(tokens=tokens, num_experts=experts, k=k, factor=factor) == slots


@settings(max_examples=500)
@given(
    st.integers(1, 300),
    st.integers(1, 64),
    st.integers(1, 8),
    st.sampled_from([-1.0, 0.25, 0.5, 1.0, 1.25, 1.5, 2.0, 8.0]),
    st.sampled_from(["maxtext", "gshard"]),
    st.integers(0, 9),
)
def test_capacity_is_the_oracles(
    tokens: int, experts: int, k: int, factor: float, rule: CapacityRule, minimum: int
) -> None:
    expected = layer_capacity(
        tokens,
        experts,
        Settings(k=k, capacity_factor=factor, capacity_rule=rule, min_capacity=minimum),
    )
    found = expert_capacity(
        tokens=tokens, num_experts=experts, k=k, factor=factor, rule=rule, minimum=minimum
    )
    assert found == expected
    assert factor > 0 or found == tokens


@pytest.mark.parametrize("drop", ["position", "probability"])
def test_the_published_example_has_the_published_slots(drop: DropPolicy) -> None:
    indices = np.array([[top_k(p, 2) for p in PROBS]])
    slots = assign_slots(jnp.array(indices), jnp.array(PROBS[None]), capacity=2, drop=drop)
    assert seated(slots, indices, 2) == [KEPT[drop]]


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, DropPolicy]:
    # Few shapes, so that few programs are compiled; few values, so that there are ties.
    rows, tokens, experts, k, capacity = draw(
        st.sampled_from([(2, 6, 3, 2, 1), (2, 6, 3, 2, 3), (1, 9, 4, 1, 2), (2, 5, 4, 4, 5)])
    )
    values = st.sampled_from([0.125, 0.25, 0.5])
    flat = draw(
        st.lists(values, min_size=rows * tokens * experts, max_size=rows * tokens * experts)
    )
    probs = np.array(flat, np.float32).reshape(rows, tokens, experts)
    indices = np.array([[top_k(p, k) for p in row] for row in probs])
    drop: DropPolicy = draw(st.sampled_from(["position", "probability"]))
    return probs, indices, capacity, drop


@settings(max_examples=150)
@given(routings())
def test_slots_are_those_of_a_plain_loop_and_pointers_are_inverse(
    routing: tuple[np.ndarray, np.ndarray, int, DropPolicy],
) -> None:
    probs, indices, capacity, drop = routing
    rows, _, k = indices.shape
    slots = assign_slots(jnp.array(indices), jnp.array(probs), capacity=capacity, drop=drop)
    for row in range(rows):
        expected = seat([list(chosen) for chosen in indices[row]], probs[row], capacity, drop)
        assert seated(slots, indices, capacity)[row] == {(*c, s) for c, s in expected.items()}
        slot_of_choice = np.asarray(slots.slot_of_choice)[row].reshape(-1)
        choice_of_slot = np.asarray(slots.choice_of_slot)[row]
        choices, places = len(slot_of_choice), len(choice_of_slot)
        assert places == probs.shape[-1] * capacity
        kept = np.flatnonzero(slot_of_choice < places)
        filled = np.flatnonzero(choice_of_slot < choices)
        assert len(kept) == len(filled) == len(expected)
        np.testing.assert_array_equal(choice_of_slot[slot_of_choice[kept]], kept)
        np.testing.assert_array_equal(slot_of_choice[choice_of_slot[filled]], filled)
        # Dropped choices point exactly one past the end: an index that reads as zero.
        assert set(np.delete(slot_of_choice, kept)) <= {places}
        assert set(np.delete(choice_of_slot, filled)) <= {choices}
        assert k * len(indices[row]) == choices
