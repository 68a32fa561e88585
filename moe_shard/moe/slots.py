"""Assign the choices of each sequence to capacity slots.

This is arithmetic on the routing decision; every sequence is handled by itself, so nothing here
communicates. Source: GShard (arXiv 2006.16668).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.moe_config import DropPolicy
from moe_shard.moe.router import ROUTING


class Slots(NamedTuple):
    """Hold the assignment of one batch: choices and slots, each pointing at the other.

    A choice is a pair (token, one of its k experts), numbered `token * K + k` within its sequence;
    a slot is a pair (expert, position in it), numbered `expert * C + position`. A dropped choice
    has no slot and points one past the last; an empty slot points one past the last choice.
    """

    slot_of_choice: Int[Array, "B S K"]
    choice_of_slot: Int[Array, "B EC"]

    def has_slot(self) -> Bool[Array, "B S K"]:
        """Return True for the choices that were not dropped."""
        return self.slot_of_choice < self.choice_of_slot.shape[-1]


def assign_slots(
    indices: Int[Array, "B S K"],
    probs: Float[Array, "B S E"],
    *,
    capacity: int,
    drop: DropPolicy = "position",
) -> Slots:
    """Assign the choices of each sequence to their experts' slots, in token order.

    Args:
        indices: the experts each token chose; E for none, which has no slot.
        probs: their probabilities; read only by drop="probability".
        capacity: C, slots of an expert for one sequence.
        drop: which choices an overfull expert keeps: the first ones of the sequence ("position"),
            or the most probable ones ("probability"; of equal ones the first).
    """
    num_experts = probs.shape[-1]
    batch, tokens, k = indices.shape
    choices = tokens * k
    expert = indices.reshape(batch, choices)
    if drop == "probability":
        # No expert, an index past the end, has the probability 0: it comes last.
        chosen = jnp.take_along_axis(
            jax.lax.stop_gradient(probs), indices, axis=-1, mode="fill", fill_value=0
        )
        preference = jnp.argsort(-chosen.reshape(batch, choices), axis=-1, stable=True)
        _, position = positions_in_expert(expert, num_experts + 1, order_first=preference)
        # Dropped choices form an extra, last expert, so that the others stay in token order below.
        expert = jnp.where(position < capacity, expert, num_experts)
    order, position = positions_in_expert(expert, num_experts + 1)
    fits = (position < capacity) & (expert < num_experts)
    slot_of_choice = jnp.where(fits, expert * capacity + position, num_experts * capacity)
    counts = count_experts(expert, num_experts)
    start = jnp.cumsum(counts, axis=-1) - counts
    within = jnp.arange(capacity)
    filled = within < counts[..., None]
    sorted_at = jnp.minimum(start[..., None] + within, choices - 1).reshape(batch, -1)
    choice_of_slot = jnp.where(
        filled.reshape(batch, -1), jnp.take_along_axis(order, sorted_at, axis=-1), choices
    )
    return Slots(
        checkpoint_name(slot_of_choice.reshape(indices.shape), ROUTING),
        checkpoint_name(choice_of_slot, ROUTING),
    )


def assign_slots_round_robin(
    batch: int, tokens: int, k: int, *, num_experts: int, capacity: int
) -> Slots:
    """Assign slots to choices made round-robin (`router.round_robin`).

    A slot follows from the number of its choice, so nothing is sorted.

    Args:
        batch: B, sequences.
        tokens: S, tokens of a sequence.
        k: K, experts per token.
        num_experts: E, experts of the layer.
        capacity: C, slots of an expert for one sequence.
    """
    choices = tokens * k
    choice = jnp.arange(choices, dtype=jnp.int32)
    expert, position = choice % num_experts, choice // num_experts
    slot = jnp.where(position < capacity, expert * capacity + position, num_experts * capacity)
    all_slots = jnp.arange(num_experts * capacity, dtype=jnp.int32)
    choice_of_slot = all_slots % capacity * num_experts + all_slots // capacity
    of_sequence = (slot.reshape(tokens, k), jnp.minimum(choice_of_slot, choices))
    return Slots(*(jnp.broadcast_to(each, (batch, *each.shape)) for each in of_sequence))


def count_experts(expert: Int[Array, "B N"], num_experts: int) -> Int[Array, "B E"]:
    """Count the choices of each expert; values from `num_experts` on do not count."""
    return jnp.sum(jax.nn.one_hot(expert, num_experts, dtype=jnp.int32), axis=1)


def positions_in_expert(
    expert: Int[Array, "B N"], num_experts: int, order_first: Int[Array, "B N"] | None = None
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """Return the stable order of choices by expert, and each choice's position in its expert.

    Sorting keeps this at O(N log N) a sequence; counting by a one-hot cumsum needs [N, E].

    Args:
        expert: each choice's expert.
        num_experts: number of different values in `expert`.
        order_first: positions follow this order of the choices instead of their own.
    """
    if order_first is None:
        order = jnp.argsort(expert, axis=-1, stable=True)
    else:
        by_expert = jnp.argsort(
            jnp.take_along_axis(expert, order_first, axis=-1), axis=-1, stable=True
        )
        order = jnp.take_along_axis(order_first, by_expert, axis=-1)
    counts = count_experts(expert, num_experts)
    start = jnp.cumsum(counts, axis=-1) - counts
    sorted_at = jnp.argsort(order, axis=-1)  # the inverse permutation: where each choice went
    return order, sorted_at - jnp.take_along_axis(start, expert, axis=-1)
