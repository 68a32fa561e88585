"""The order in which a device's choices stand before they travel: sorted by expert, stably.

Arithmetic on the routing decision of one device's tokens; nothing here communicates.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from moe_shard.moe.capacity import Slots, count_experts, ranks_within_expert
from moe_shard.moe.dispatch.plan import aligned, before, rows_from
from moe_shard.moe.router import ROUTING


class Seating(NamedTuple):
    """Choices sorted by expert.

    Attributes:
        slots: choices and their rows, each pointing at the other, as of a batch of one.
        rank: of each choice among its expert's.
        counts: choices of each expert.
    """

    slots: Slots
    rank: Int[Array, "T K"]
    counts: Int[Array, "E"]


def seat(indices: Int[Array, "T K"], num_experts: int) -> Seating:
    """Sort a device's choices by expert.

    Args:
        indices: each token's experts.
        num_experts: E.
    """
    expert = indices.reshape(1, -1)
    order, rank = ranks_within_expert(expert, num_experts)
    counts = count_experts(expert, num_experts)[0]
    place = before(counts)[expert] + rank
    return Seating(
        Slots(
            checkpoint_name(place.reshape(1, *indices.shape), ROUTING),
            checkpoint_name(order, ROUTING),
        ),
        checkpoint_name(rank.reshape(indices.shape), ROUTING),
        checkpoint_name(counts, ROUTING),
    )


def seat_known(indices: Int[np.ndarray, "T K"], num_experts: int) -> Seating:
    """The same for choices that are known when the program is traced: constants, and no sort.

    Args:
        indices: each token's experts.
        num_experts: E.
    """
    expert = indices.reshape(-1)
    order = np.argsort(expert, kind="stable").astype(np.int32)
    place = np.empty_like(order)
    place[order] = np.arange(order.size, dtype=np.int32)
    counts = np.bincount(expert, minlength=num_experts).astype(np.int32)
    rank = place - (np.cumsum(counts) - counts).astype(np.int32)[expert]
    slots = Slots(jnp.asarray(place.reshape(1, *indices.shape)), jnp.asarray(order[None]))
    return Seating(slots, jnp.asarray(rank.reshape(indices.shape)), jnp.asarray(counts))


def at_aligned_groups(
    seating: Seating, indices: Int[Array, "T K"], *, alignment: int, rows: int
) -> tuple[Slots, Int[Array, "E"]]:
    """The slots of rows that need not travel: each group begins at a multiple of `alignment`.

    Args:
        seating: of `seat`.
        indices: each token's experts.
        alignment: see above.
        rows: of the buffer.

    Returns:
        The slots, and the groups' sizes, their padding included.
    """
    sizes = aligned(seating.counts, alignment)
    starts = before(sizes)
    choices = indices.size
    sorted_row = rows_from(
        to=starts, size=seating.counts, source=before(seating.counts), rows=rows, missing=choices
    )
    order = jnp.append(seating.slots.choice_of_slot[0], choices)
    return Slots((starts[indices] + seating.rank)[None], order[sorted_row][None]), sizes
