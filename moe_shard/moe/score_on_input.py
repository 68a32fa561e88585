"""Apply combine weights to what experts take in, not to what they give (Llama 4).

Each choice then has an array of its own before it is dispatched, so choices take the tokens' place:
a token's K choices become K tokens with one choice each, numbered as they were. Dispatch does not
see the difference, and expert outputs are summed with weights of one.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_shard.moe.slots import Slots


def scaled_copies(
    x: Float[Array, "*B S M"], weights: Float[Array, "*B S K"]
) -> Float[Array, "*B S*K M"]:
    """Copy a token for each of its choices, times the choice's weight, in `x`'s dtype."""
    copies = x[..., None, :].astype(jnp.float32) * weights[..., None]
    return copies.astype(x.dtype).reshape(*x.shape[:-2], -1, x.shape[-1])


def slots_of_copies(slots: Slots) -> Slots:
    """Return the slots of choices that are tokens of their own."""
    batch = slots.slot_of_choice.shape[0]
    return Slots(slots.slot_of_choice.reshape(batch, -1, 1), slots.choice_of_slot)


def score_on_input(
    x: Float[Array, "B S M"], slots: Slots, weights: Float[Array, "B S K"]
) -> tuple[Float[Array, "B S*K M"], Slots, Float[Array, "B S K"]]:
    """Return what to dispatch, its slots, and the combine weights that are left."""
    return scaled_copies(x, weights), slots_of_copies(slots), jnp.ones_like(weights)
