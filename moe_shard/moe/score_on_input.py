"""Apply combine weights to the experts' input instead of their output (Llama 4).

Each choice then has a vector of its own before it is dispatched, so choices replace tokens: the K
choices of a token become K tokens with one choice each, in the same order. Dispatch need not know,
and expert outputs are summed with weights of one.
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
    """Return what to dispatch, its slots, and the combine weights still to apply."""
    return scaled_copies(x, weights), slots_of_copies(slots), jnp.ones_like(weights)
