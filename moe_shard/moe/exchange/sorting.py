"""Sort a device's choices stably by expert: the order in which its token copies are sent.

This is arithmetic on the routing decision of one device's tokens; nothing here communicates.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from moe_shard.moe.exchange.segments import aligned, exclusive_cumsum, gather_indices
from moe_shard.moe.router import ROUTING
from moe_shard.moe.slots import Slots, count_experts, positions_in_expert


class SortedChoices(NamedTuple):
    """Hold choices sorted by expert.

    Attributes:
        slots: choices and their places in the order, each pointing at the other, as for a batch of
            one sequence.
        position: position of each choice in its expert.
        counts: number of choices of each expert.
    """

    slots: Slots
    position: Int[Array, "T K"]
    counts: Int[Array, "E"]


def sort_by_expert(
    indices: Int[Array, "T K"], num_experts: int, *, padded: bool = False
) -> SortedChoices:
    """Sort a device's choices by expert.

    Args:
        indices: each token's experts.
        num_experts: E, experts of the layer.
        padded: whether some choices are E, of no expert: they come last, and are not counted, so
            that no device sends them.
    """
    expert = indices.reshape(1, -1)
    groups = num_experts + padded
    order, position = positions_in_expert(expert, groups)
    counts = count_experts(expert, groups)[0]
    sorted_at = exclusive_cumsum(counts)[expert] + position
    return SortedChoices(
        Slots(
            checkpoint_name(sorted_at.reshape(1, *indices.shape), ROUTING),
            checkpoint_name(order, ROUTING),
        ),
        checkpoint_name(position.reshape(indices.shape), ROUTING),
        checkpoint_name(counts[:num_experts], ROUTING),
    )


def sort_known_choices(indices: Int[np.ndarray, "T K"], num_experts: int) -> SortedChoices:
    """Sort choices that are known at tracing time; the program has constants and no sort.

    Args:
        indices: each token's experts.
        num_experts: E, experts of the layer.
    """
    expert = indices.reshape(-1)
    order = np.argsort(expert, kind="stable").astype(np.int32)
    sorted_at = np.empty_like(order)
    sorted_at[order] = np.arange(order.size, dtype=np.int32)
    counts = np.bincount(expert, minlength=num_experts).astype(np.int32)
    position = sorted_at - (np.cumsum(counts) - counts).astype(np.int32)[expert]
    slots = Slots(jnp.asarray(sorted_at.reshape(1, *indices.shape)), jnp.asarray(order[None]))
    return SortedChoices(slots, jnp.asarray(position.reshape(indices.shape)), jnp.asarray(counts))


def align_groups(
    choices: SortedChoices, indices: Int[Array, "T K"], *, alignment: int, length: int
) -> tuple[Slots, Int[Array, "L"]]:
    """Lay out copies that stay on their device: each group starts at a multiple of `alignment`.

    Args:
        choices: the result of `sort_by_expert`.
        indices: each token's experts; E for none, which has no place.
        alignment: groups start at multiples of this.
        length: R, of the buffer.

    Returns:
        The slots, and the groups' sizes, their padding included.
    """
    sizes = aligned(choices.counts, alignment)
    starts = exclusive_cumsum(sizes)
    total = indices.size
    sorted_at = gather_indices(
        to=starts,
        size=choices.counts,
        source=exclusive_cumsum(choices.counts),
        length=length,
        missing=total,
    )
    order = jnp.append(choices.slots.choice_of_slot[0], total)
    place = jnp.append(starts, length)[indices] + choices.position
    return Slots(place[None], order[sorted_at][None]), sizes
