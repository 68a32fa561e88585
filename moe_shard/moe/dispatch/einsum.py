"""Dispatch by one-hot masks, as in GShard (arXiv 2006.16668) and MaxText's dense path.

The strategy `einsum` makes two products with a [B, S, E*C] mask. With C near S*K/E their cost grows
with S squared; it is for comparison, and for hardware on which a gather is slow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_shard.config.strategies import register_strategy
from moe_shard.moe.by_capacity import ByCapacity
from moe_shard.moe.slots import Slots


@register_strategy("einsum", has_slots=True)
class Einsum(ByCapacity):
    """Fill and read capacity slots by products with a mask."""

    def dispatch(
        self, x: Float[Array, "B S M"], slots: Slots, num_experts: int
    ) -> Float[Array, "E B C M"]:
        """Copy each token into the slots of its choices, see `ByCapacity`."""
        ones = jnp.ones(slots.slot_of_choice.shape, x.dtype)
        return jnp.einsum("bsec,bsm->ebcm", _mask(ones, slots, num_experts), x)

    def combine(
        self, y: Float[Array, "E B C M"], weights: Float[Array, "B S K"], slots: Slots
    ) -> Float[Array, "B S M"]:
        """Sum each token's slots, see `ByCapacity`."""
        mask = _mask(weights.astype(jnp.float32), slots, y.shape[0])
        return jnp.einsum("bsec,ebcm->bsm", mask, y.astype(jnp.float32)).astype(y.dtype)


def _mask(values: Float[Array, "B S K"], slots: Slots, num_experts: int) -> Float[Array, "B S E C"]:
    """Put `values` at each choice's slot and zero elsewhere; a dropped choice has no slot."""
    batch, tokens, k = values.shape
    all_slots = slots.choice_of_slot.shape[-1]
    mask = sum(
        values[..., i, None]
        * jax.nn.one_hot(slots.slot_of_choice[..., i], all_slots, dtype=values.dtype)
        for i in range(k)
    )
    return jnp.reshape(mask, (batch, tokens, num_experts, all_slots // num_experts))
