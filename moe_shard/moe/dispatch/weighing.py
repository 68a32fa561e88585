"""Weights on what experts take in, not on what they give (Llama 4).

Each choice then has a row of its own before it is dispatched, so choices take the tokens' place:
a token's K choices become K tokens with one choice each, numbered as they were. Dispatch has no
more to know of it, and the answers are summed with weights of one.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_shard.moe.capacity import Slots


def weighed(x: Float[Array, "*B S M"], weights: Float[Array, "*B S K"]) -> Float[Array, "*B S*K M"]:
    """A token's row for each of its choices, times the choice's weight, in `x`'s dtype."""
    rows = x[..., None, :].astype(jnp.float32) * weights[..., None]
    return rows.astype(x.dtype).reshape(*x.shape[:-2], -1, x.shape[-1])


def of_choices(slots: Slots) -> Slots:
    """The slots of choices that are tokens of their own."""
    batch = slots.slot_of_choice.shape[0]
    return Slots(slots.slot_of_choice.reshape(batch, -1, 1), slots.choice_of_slot)


def on_input(
    x: Float[Array, "B S M"], slots: Slots, weights: Float[Array, "B S K"]
) -> tuple[Float[Array, "B S*K M"], Slots, Float[Array, "B S K"]]:
    """What to dispatch, its slots, and the weights that are left for the sum."""
    return weighed(x, weights), of_choices(slots), jnp.ones_like(weights)
