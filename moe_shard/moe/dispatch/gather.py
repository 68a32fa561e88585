"""Dispatch by index: gather tokens into slots, and slots back into tokens.

The strategy `gather` has the same arrays and the same exchange as `einsum`, without its product
over S * E * C.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from moe_shard.config.strategies import register_strategy
from moe_shard.moe.by_capacity import ByCapacity
from moe_shard.moe.slot_gathers import slots_to_tokens, tokens_to_slots
from moe_shard.moe.slots import Slots


@register_strategy("gather", has_slots=True)
class Gather(ByCapacity):
    """Fill and read capacity slots by gathers."""

    def dispatch(
        self, x: Float[Array, "B S M"], slots: Slots, num_experts: int
    ) -> Float[Array, "E B C M"]:
        """Copy each token into the slots of its choices, see `ByCapacity`."""
        by_slot = tokens_to_slots(x, slots)
        batch, all_slots, dim = by_slot.shape
        return by_slot.reshape(batch, num_experts, all_slots // num_experts, dim).swapaxes(0, 1)

    def combine(
        self, y: Float[Array, "E B C M"], weights: Float[Array, "B S K"], slots: Slots
    ) -> Float[Array, "B S M"]:
        """Sum each token's slots, see `ByCapacity`."""
        num_experts, batch, capacity, dim = y.shape
        by_slot = y.swapaxes(0, 1).reshape(batch, num_experts * capacity, dim)
        return slots_to_tokens(by_slot, weights, slots)
