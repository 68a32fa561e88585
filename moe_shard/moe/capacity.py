"""Capacity and slots: which choices of a batch row fit into its experts, and where each sits.

Arithmetic on the routing decision only; every row is handled by itself, so nothing here
communicates. Sources: GShard (arXiv 2006.16668); MaxText for the capacity of a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.moe_config import CapacityRule, DropPolicy, MoEConfig
from moe_shard.moe.router import ROUTING


def expert_capacity(
    *,
    tokens: int,
    num_experts: int,
    k: int,
    factor: float,
    rule: CapacityRule = "maxtext",
    minimum: int = 0,
) -> int:
    """Slots an expert has for one batch row.

    Args:
        tokens: S, tokens in the row.
        num_experts: E.
        k: experts per token.
        factor: slots relative to a perfectly balanced load. 0 or less: as many slots as the row
            has tokens, which drops nothing, since a token chooses an expert at most once.
        rule: "maxtext": int(max(ceil(S*k/E) * factor, factor)); "gshard": ceil(S/E * factor * k).
        minimum: a floor on the result (GShard's `min_capacity`).
    """
    if factor <= 0:
        return tokens
    if rule == "maxtext":
        slots = int(max(math.ceil(tokens * k / num_experts) * factor, factor))
    else:
        slots = math.ceil(tokens * factor * k / num_experts)
    return max(slots, minimum)


def row_capacity(config: MoEConfig, *, tokens: int) -> int:
    """Slots that an expert is given for one batch row of this many tokens.

    At most `tokens`: more could never be filled.
    """
    slots = expert_capacity(
        tokens=tokens,
        num_experts=config.num_experts,
        k=config.num_experts_per_tok,
        factor=config.capacity_factor,
        rule=config.capacity_rule,
        minimum=config.min_capacity,
    )
    return min(slots, tokens)


def slots_per_row(config: MoEConfig, *, tokens: int) -> int:
    """What is carried to the experts for one batch row: its slots, or its choices."""
    if config.moe_dispatch == "ragged":
        return tokens * config.num_experts_per_tok
    return config.num_experts * row_capacity(config, tokens=tokens)


class Slots(NamedTuple):
    """The seating of one batch: choices and slots, each pointing at the other.

    A choice is a pair (token, one of its k experts), numbered `token * K + k` within its row; a
    slot is a pair (expert, position), numbered `expert * C + position`. A choice without a slot
    was dropped and points one past the last slot; an empty slot points one past the last choice.
    """

    slot_of_choice: Int[Array, "B S K"]
    choice_of_slot: Int[Array, "B EC"]

    def kept(self) -> Bool[Array, "B S K"]:
        """True for the choices that were not dropped."""
        return self.slot_of_choice < self.choice_of_slot.shape[-1]


def assign_slots(
    indices: Int[Array, "B S K"],
    probs: Float[Array, "B S E"],
    *,
    capacity: int,
    drop: DropPolicy = "position",
) -> Slots:
    """Seat a row's choices in its experts' slots, in token order.

    Args:
        indices: the experts each token chose.
        probs: their probabilities; read only by drop="probability".
        capacity: C, slots of an expert for one row.
        drop: which choices an overfull expert keeps: the first ones of the row ("position"), or
            the most probable ones ("probability", of equal ones the first).
    """
    num_experts = probs.shape[-1]
    batch, tokens, k = indices.shape
    choices = tokens * k
    expert = indices.reshape(batch, choices)
    if drop == "probability":
        chosen = jnp.take_along_axis(jax.lax.stop_gradient(probs), indices, axis=-1)
        preference = jnp.argsort(-chosen.reshape(batch, choices), axis=-1, stable=True)
        _, rank = ranks_within_expert(expert, num_experts, order_first=preference)
        # The unseated form an extra, last expert, so that the seated keep token order below.
        expert = jnp.where(rank < capacity, expert, num_experts)
    order, rank = ranks_within_expert(expert, num_experts + 1)
    seated = (rank < capacity) & (expert < num_experts)
    slot_of_choice = jnp.where(seated, expert * capacity + rank, num_experts * capacity)
    counts = count_experts(expert, num_experts)
    start = jnp.cumsum(counts, axis=-1) - counts
    position = jnp.arange(capacity)
    filled = position < counts[..., None]
    place = jnp.minimum(start[..., None] + position, choices - 1).reshape(batch, -1)
    choice_of_slot = jnp.where(
        filled.reshape(batch, -1), jnp.take_along_axis(order, place, axis=-1), choices
    )
    return Slots(
        checkpoint_name(slot_of_choice.reshape(indices.shape), ROUTING),
        checkpoint_name(choice_of_slot, ROUTING),
    )


def assign_slots_in_turn(
    batch: int, tokens: int, k: int, *, num_experts: int, capacity: int
) -> Slots:
    """The slots of choices that are dealt out to the experts in turn (`router.round_robin`).

    They follow from the number of a choice, so nothing is sorted.

    Args:
        batch: B.
        tokens: S.
        k: K.
        num_experts: E.
        capacity: C.
    """
    choices = tokens * k
    choice = jnp.arange(choices, dtype=jnp.int32)
    expert, rank = choice % num_experts, choice // num_experts
    slot = jnp.where(rank < capacity, expert * capacity + rank, num_experts * capacity)
    place = jnp.arange(num_experts * capacity, dtype=jnp.int32)
    seated = place % capacity * num_experts + place // capacity
    row = (slot.reshape(tokens, k), jnp.minimum(seated, choices))
    return Slots(*(jnp.broadcast_to(each, (batch, *each.shape)) for each in row))


def count_experts(expert: Int[Array, "B N"], num_experts: int) -> Int[Array, "B E"]:
    """How many choices of a row fell on each expert; values from `num_experts` on do not count."""
    return jnp.sum(jax.nn.one_hot(expert, num_experts, dtype=jnp.int32), axis=1)


def ranks_within_expert(
    expert: Int[Array, "B N"], num_experts: int, order_first: Int[Array, "B N"] | None = None
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """Stable order of the choices by expert, and each choice's rank among its expert's.

    Sorting keeps this at O(N log N) a row; counting with a one-hot cumsum needs an [N, E] array.

    Args:
        expert: each choice's expert.
        num_experts: number of different values in `expert`.
        order_first: ranks follow this order of the choices instead of their own.
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
    place = jnp.argsort(order, axis=-1)  # the inverse permutation: where each choice went
    return order, place - jnp.take_along_axis(start, expert, axis=-1)
